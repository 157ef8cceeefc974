import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxt_dist.data.order import PackCursor, PackStream, epoch_permutation, packs_in_index_order
from rxt_dist.errors import DataError

lengths_strategy = st.lists(st.integers(1, 20), min_size=1, max_size=60)


def take(stream, cursor, count):
    packs, cursors = [], []
    for _ in range(count):
        pack, cursor = stream.next_pack(cursor)
        packs.append(list(zip(pack.epochs.tolist(), pack.pieces.tolist(), strict=True)))
        cursors.append(cursor)
    return packs, cursors


@given(lengths_strategy, st.integers(20, 200), st.integers(0, 2**64 - 1))
def test_every_piece_occurs_exactly_once_in_every_epoch_and_packs_are_next_fit(lengths, budget, key):
    stream = PackStream(lengths, key=key, pack_tokens=budget)
    packs, cursor = [], PackCursor()
    while cursor.epoch < 3:
        pack, cursor = stream.next_pack(cursor)
        packs.append(pack)
    visits = [v for p in packs for v in zip(p.epochs.tolist(), p.pieces.tolist(), strict=True)]
    for epoch in range(3):
        assert sorted(piece for e, piece in visits if e == epoch) == list(range(len(lengths)))
    assert [e for e, _ in visits] == sorted(e for e, _ in visits)
    sizes = [sum(lengths[p] for p in pack.pieces) for pack in packs]
    assert max(sizes) <= budget
    for size, following in zip(sizes, packs[1:], strict=False):
        assert size + lengths[following.pieces[0]] > budget


@given(lengths_strategy, st.integers(20, 100), st.integers(0, 12))
def test_restart_from_any_cursor_continues_identically(lengths, budget, steps):
    packs, cursors = take(PackStream(lengths, key=7, pack_tokens=budget), PackCursor(), steps + 8)
    cursor = cursors[steps - 1] if steps else PackCursor()
    restored = PackCursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
    again, _ = take(PackStream(lengths, key=7, pack_tokens=budget), restored, 8)
    assert again == packs[steps : steps + 8]


def test_going_back_to_an_old_cursor_gives_the_same_pack():
    stream = PackStream([3, 4, 5], key=1, pack_tokens=8)
    first, _ = stream.next_pack(PackCursor())
    take(stream, PackCursor(), 20)
    again, _ = stream.next_pack(PackCursor())
    np.testing.assert_array_equal(first.pieces, again.pieces)


def test_order_depends_on_key_and_epoch_and_is_a_permutation():
    orders = [epoch_permutation(key, epoch, 50).tolist() for key in (1, 2) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(50)) for o in orders)


def test_the_order_is_the_published_one():
    # A change here silently changes every resumed run.
    assert epoch_permutation(123, 0, 8).tolist() == [3, 6, 4, 0, 2, 1, 7, 5]


def test_budget_equal_to_the_single_long_piece():
    stream = PackStream([512], key=0, pack_tokens=512)
    packs, cursors = take(stream, PackCursor(), 3)
    assert packs == [[(0, 0)], [(1, 0)], [(2, 0)]]
    assert cursors == [PackCursor(1, 0), PackCursor(2, 0), PackCursor(3, 0)]


def test_a_pack_larger_than_the_dataset_runs_over_several_epochs():
    pack, cursor = PackStream([2, 3], key=0, pack_tokens=23).next_pack(PackCursor())
    assert np.bincount(pack.epochs).tolist()[:4] == [2, 2, 2, 2]
    assert cursor.epoch == 4
    assert 20 <= sum([2, 3][p] for p in pack.pieces) <= 23


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([4, 9, 2], r"batch\.pack_tokens: 8 is less than the longest piece \(9 tokens, piece 1\)"),
        ([], "no pieces"),
        ([3, 0], "piece 1 has 0 tokens"),
    ],
)
def test_unusable_lengths_are_refused(lengths, message):
    with pytest.raises(DataError, match=message):
        PackStream(lengths, key=0, pack_tokens=8)
    with pytest.raises(DataError, match=message):
        list(packs_in_index_order(lengths, 8))


def test_a_cursor_of_another_dataset_is_refused():
    with pytest.raises(DataError, match="piece 3 is beyond the dataset's 3 pieces"):
        PackStream([1, 1, 1], key=0, pack_tokens=8).next_pack(PackCursor(0, 3))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"epoch": 0},
        {"epoch": -1, "piece": 0},
        {"epoch": 0, "piece": 1.0},
        {"epoch": 0, "piece": 0, "x": 1},
    ],
)
def test_malformed_cursor_state_is_refused(state):
    with pytest.raises(DataError, match="data cursor"):
        PackCursor.from_dict(state)


@given(lengths_strategy, st.integers(20, 100))
def test_index_order_packs_cover_everything_once(lengths, budget):
    packs = list(packs_in_index_order(lengths, budget))
    assert np.concatenate([p.pieces for p in packs]).tolist() == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in p.pieces) <= budget for p in packs)
    assert not any(p.epochs.any() for p in packs)
