import json
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data import order as order_module
from rxt_dist.data.order import PackCursor, PackStream, epoch_permutation, packs_in_index_order, permuted
from rxt_dist.errors import DataError
from rxt_dist.randomness import derive_key

lengths_strategy = st.lists(st.integers(1, 20), min_size=1, max_size=60)


def take(stream, cursor, count):
    packs, cursors = [], []
    for _ in range(count):
        pack, cursor = stream.next_pack(cursor)
        packs.append(list(zip(pack.epochs.tolist(), pack.pieces.tolist(), strict=True)))
        cursors.append(cursor)
    return packs, cursors


@settings(deadline=None)
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


@settings(deadline=None)
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


# --- the permutation that is never held -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 100, 1000, 4096, 4097, 70_001])
def test_it_is_a_permutation_wherever_it_is_looked_at(count):
    whole = permuted(11, np.arange(count), count)
    assert sorted(whole.tolist()) == list(range(count))
    places = np.random.default_rng(0).integers(0, count, 50)
    assert permuted(11, places, count).tolist() == whole[places].tolist()


@pytest.mark.parametrize("count", [4, 5])
def test_all_orders_are_equally_likely(count):
    draws, orders = 6000, math.factorial(count)
    found = Counter(tuple(permuted(derive_key(k), np.arange(count), count).tolist()) for k in range(draws))
    expected = draws / orders
    chi = sum((found[o] - expected) ** 2 / expected for o in found) + (orders - len(found)) * expected
    assert abs(chi - (orders - 1)) < 4 * math.sqrt(2 * (orders - 1))


@pytest.mark.parametrize("count", [1000, 65_536, 100_003])
def test_it_shuffles_as_well_as_a_shuffled_array(count):
    places = np.arange(count)
    whole = permuted(5, places, count)
    tolerance = 4 / math.sqrt(count)  # four standard deviations, roughly
    assert abs(np.abs(whole - places).mean() / count - 1 / 3) < tolerance
    assert abs(np.corrcoef(whole, places)[0, 1]) < tolerance
    assert abs(np.corrcoef(whole[1:], whole[:-1])[0, 1]) < tolerance
    assert abs(np.corrcoef(whole, permuted(6, places, count))[0, 1]) < tolerance
    assert np.count_nonzero(np.diff(whole) == 1) < 10  # one is expected
    # Every tenth of the epoch has as much of every tenth of the dataset.
    table = np.histogram2d(places, whole, bins=10)[0]
    assert ((table - count / 100) ** 2 / (count / 100)).sum() < 81 + 5 * math.sqrt(2 * 81)


def test_the_shuffle_is_the_published_one():
    # A change here silently changes every resumed run.
    assert permuted(123, np.arange(8), 8).tolist() == [5, 1, 3, 7, 6, 2, 0, 4]
    assert permuted(123, np.arange(5), 1_000_003).tolist() == [94705, 738959, 601366, 470307, 942265]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(12, 60))
def test_the_parts_in_which_it_is_planned_do_not_show(part, budget):
    lengths = np.random.default_rng(part).integers(1, 12, 40)

    def packs():
        return take(PackStream(lengths, key=4, pack_tokens=budget), PackCursor(), 60)

    expected = packs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "_PART_PIECES", part)
        assert packs() == expected


def test_an_epoch_of_many_pieces_is_planned_in_little_memory():
    count = 100_000_000
    lengths = np.broadcast_to(np.int32(700), count)
    middle = PackCursor(3, count // 2)
    tracemalloc.start()
    stream = PackStream(lengths, key=1, pack_tokens=2048)
    packs, cursors = take(stream, middle, 40_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cursors[-1] == PackCursor(3, count // 2 + 2 * 40_000)
    pieces = [piece for pack in packs for _, piece in pack]
    assert len(set(pieces)) == len(pieces)
    assert peak < 150_000_000  # 80,000 pairs of Python integers are most of it; an array would be 800 MB
