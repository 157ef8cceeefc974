import itertools
import json
from collections import Counter

import numpy as np
import pytest
from dataset_builder import MASK, ArrayPieces, document, random_conversations, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data.loader import TextLoader, evaluation_batches
from rxt_dist.data.manifest import fingerprint_of, load_manifest, write_manifest
from rxt_dist.data.mixing import MixCursor, MixedPieces, PackMixer, mixed_in_index_order, turns
from rxt_dist.data.order import PackCursor
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import DataError

SIZES, WEIGHTS = (13, 29, 5), (2, 5, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three text datasets; every document is different."""
    return [
        write_dataset(
            tmp_path_factory.mktemp(f"part{n}"),
            "text",
            [document(10 + (i * 7) % 30, seed=100 * n + i) for i in range(size)],
            [document(12, seed=1000 * (n + 1) + i) for i in range(n + 2)],
        )
        for n, size in enumerate(SIZES)
    ]


def mixed(folders, weights=WEIGHTS, split="train", **options):
    parts = [TextPieces(Dataset(folder, split, **options), 16) for folder in folders]
    return MixedPieces(parts, weights)


@pytest.fixture
def source(folders):
    return mixed(folders)


# --- the cycle --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_the_cycle_is_exact_and_even(weights):
    cycle = turns(weights)
    total = sum(weights)
    counts = Counter(cycle)
    assert all(counts[i] * total == weight * len(cycle) for i, weight in enumerate(weights))
    for i, weight in enumerate(weights):  # at no point is a dataset a whole turn of all behind or ahead
        due = np.arange(1, len(cycle) + 1) * weight / total
        assert np.abs(np.cumsum(np.equal(cycle, i)) - due).max() < len(weights)


def test_common_factors_do_not_matter():
    assert turns([20, 50, 10]) == turns([2, 5, 1])
    assert turns([7]) == [0]
    assert turns([1, 1]) == [0, 1]


# --- pieces -----------------------------------------------------------------------------------------------


def test_mixed_pieces_are_those_of_the_parts(folders, source):
    alone = [TextPieces(Dataset(folder, "train"), 16) for folder in folders]
    assert source.starts.tolist() == np.cumsum([0, *(len(part.lengths) for part in alone)]).tolist()
    expected = [part.read(i) for part in alone for i in range(len(part.lengths))]
    assert source.lengths.tolist() == [len(piece.tokens) for piece in expected]
    assert source.supervised.tolist() == [len(piece.tokens) - piece.first_target for piece in expected]
    for i, piece in enumerate(expected):
        found = source.read(i)
        assert (found.tokens.tolist(), found.first_target) == (piece.tokens.tolist(), piece.first_target)
    order = np.random.default_rng(1).permutation(len(expected))
    assert source.read_tokens(order).tolist() == [t for i in order for t in expected[i].tokens.tolist()]
    assert source.read_tokens(order[:0]).tolist() == []


def test_the_fingerprint_knows_datasets_weights_and_their_order(folders):
    variants = [
        mixed(folders),
        mixed(folders, (2, 5, 2)),
        mixed(folders[:2], WEIGHTS[:2]),
        mixed(folders[::-1], WEIGHTS),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert mixed(folders).fingerprint == variants[0].fingerprint


def test_another_tokenizer_is_refused(tmp_path, folders):
    other = write_dataset(tmp_path, "text", [document(9, seed=1)])
    manifest = load_manifest(other).model_copy(update={"tokenizer_sha256": "1" * 64})
    write_manifest(other, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))
    with pytest.raises(DataError, match=f"{other} was not made with the tokenizer of {folders[0]}"):
        mixed([folders[0], other], (1, 1))


def test_damage_is_of_the_dataset_it_is_in(tmp_path, folders):
    folder = write_dataset(tmp_path, "text", [document(10, seed=i) for i in range(6)])
    shard = folder / "train" / "rxt-train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[520] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    source = mixed([folders[0], folder], (1, 1), skip_corrupt=True)
    first = int(source.starts[1])
    lost = source.lost(np.arange(len(source.lengths)))
    assert np.flatnonzero(lost).tolist() == [first, first + 1, first + 2]
    names = [Dataset(path, "train").fingerprint for path in (folders[0], folder)]
    assert list(source.damage()) == [(names[1], 0)]
    again = mixed([folders[0], folder], (1, 1), skip_corrupt=True)
    again.lose([(names[0], 1), (names[1], 1), ("of another stage", 99)])
    assert sorted(again.damage()) == sorted([(names[0], 1), (names[1], 1)])
    with pytest.raises(DataError, match="has 2 blocks, found 2"):
        again.lose([(names[1], 2)])


# --- the stream -------------------------------------------------------------------------------------------


def packs_of(source, count, cursor=None, key=3):
    mixer = PackMixer(source, key=key, pack_tokens=40)
    return mixer.next_packs(cursor or mixer.first(), count)


def test_shares_are_exact_over_a_cycle_and_every_epoch_has_every_piece_once(source):
    packs, cursor = packs_of(source, 8 * 40)
    dataset = [int(np.searchsorted(source.starts, pack.pieces[0], side="right")) - 1 for pack in packs]
    for pack, number in zip(packs, dataset, strict=True):
        assert (pack.pieces >= source.starts[number]).all()
        assert (pack.pieces < source.starts[number + 1]).all()
        assert source.lengths[pack.pieces].sum() <= 40
    for start in range(len(packs) - 8):  # any eight packs in a row
        assert Counter(dataset[start : start + 8]) == {0: 2, 1: 5, 2: 1}
    for number, place in enumerate(cursor.parts):
        own = [p for p, n in zip(packs, dataset, strict=True) if n == number]
        visits = [v for p in own for v in zip(p.epochs.tolist(), p.pieces.tolist(), strict=True)]
        assert place.epoch >= 2
        for epoch in range(place.epoch):
            pieces = sorted(piece for e, piece in visits if e == epoch)
            assert pieces == list(range(source.starts[number], source.starts[number + 1]))
    assert len({place.epoch for place in cursor.parts}) > 1  # epochs are counted for each dataset
    assert cursor.epoch == max(place.epoch for place in cursor.parts)
    assert cursor.pack == len(packs)


def test_equal_datasets_have_different_orders(folders):
    packs, _ = packs_of(mixed([folders[1], folders[1]], (1, 1)), 40)
    half = int(mixed([folders[1], folders[1]], (1, 1)).starts[1])
    first = np.concatenate([p.pieces for p in packs[::2]])
    second = np.concatenate([p.pieces for p in packs[1::2]]) - half
    assert first[:30].tolist() != second[:30].tolist()


@settings(deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_restart_from_any_cursor_continues_identically(done, chunks):
    parts = [ArrayPieces(range(1, 9)), ArrayPieces([5] * 40)]
    source = MixedPieces.__new__(MixedPieces)
    source.parts, source.weights, source.starts = parts, [3, 1], np.array([0, 8, 48])
    whole, _ = packs_of(source, done + sum(chunks))
    _, cursor = packs_of(source, done) if done else (None, None)
    found = []
    for chunk in chunks:
        if cursor is not None:
            cursor = MixCursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
        packs, cursor = packs_of(source, chunk, cursor)
        found += packs
    assert [p.pieces.tolist() for p in found] == [p.pieces.tolist() for p in whole[done:]]
    assert [p.epochs.tolist() for p in found] == [p.epochs.tolist() for p in whole[done:]]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"pack": 1},
        {"pack": -1, "datasets": [{"epoch": 0, "piece": 0}]},
        {"pack": True, "datasets": [{"epoch": 0, "piece": 0}]},
        {"pack": 1, "datasets": []},
        {"pack": 1, "datasets": [3]},
        {"pack": 1, "datasets": [{"epoch": 0, "piece": -1}]},
        {"pack": 1, "datasets": [{"epoch": 0, "piece": 0}], "x": 1},
    ],
)
def test_malformed_state_is_refused(state):
    with pytest.raises(DataError, match="data cursor"):
        MixCursor.from_dict(state)


def test_a_cursor_of_other_datasets_is_refused(source):
    with pytest.raises(DataError, match="it is of 1 datasets, this stage has 3"):
        packs_of(source, 1, MixCursor.initial(1))
    with pytest.raises(DataError, match="piece 5000 is beyond"):
        packs_of(source, 8, MixCursor(0, (PackCursor(0, 5000),) * 3))


# --- elastic resume ---------------------------------------------------------------------------------------


def steps(source, count, *, dp_size=1, cursor=None, prefetch_steps=2):
    """Per step what all ranks together hold, in the order of the packs, and the cursor after it."""
    loaders = [
        TextLoader(
            source,
            key=9,
            packs=8,
            pack_tokens=40,
            micro_packs=1,
            dp_rank=rank,
            dp_size=dp_size,
            masking_probability=0.2,
            mask_id=MASK,
            cursor=cursor,
            prefetch_steps=prefetch_steps,
        )
        for rank in range(dp_size)
    ]
    found = []
    for _ in range(count):
        parts = [next(loader) for loader in loaders]
        batches = [batch for part in parts for batch in part.batches]
        content = [
            (b.tokens.tolist(), b.masked_index.tolist(), b.next_index.tolist(), b.token_keys.tolist())
            for b in batches
        ]
        assert all(part.cursor == parts[0].cursor and part.counts == parts[0].counts for part in parts)
        found.append((content, parts[0].counts, parts[0].cursor))
    for loader in loaders:
        loader.close()
    return found


@pytest.mark.parametrize("kind", ["one text", "mixed text", "mixed interactions"])
def test_ranks_can_change_after_every_step(folders, tmp_path, kind):
    """dp 1, 2, 4, 1, ... and back, each time a new process would start from the state alone."""
    if kind == "one text":
        source = TextPieces(Dataset(folders[1], "train"), 16)
    elif kind == "mixed text":
        source = mixed(folders)
    else:
        talks = [
            write_dataset(tmp_path / str(n), "conversations", random_conversations(9 + n, seed=n))
            for n in range(2)
        ]
        source = MixedPieces([InteractionPieces(Dataset(folder, "train"), 16) for folder in talks], (3, 1))
    whole = steps(source, 12)
    assert whole[-1][2].epoch > 1
    found, cursor = [], None
    layouts = itertools.cycle([(1, 1), (2, 2), (4, 0), (1, 2), (8, 1), (2, 0)])
    for (dp_size, prefetch), count in zip(layouts, (1, 2, 1, 1, 3, 1, 2, 1), strict=False):
        found += steps(source, count, dp_size=dp_size, cursor=cursor, prefetch_steps=prefetch)
        cursor = MixCursor.from_dict(json.loads(json.dumps(found[-1][2].to_dict())))
    assert found == whole


def test_evaluation_takes_turns_until_all_are_exhausted(folders):
    source = mixed(folders, split="val")
    packs = list(mixed_in_index_order(source, 24))
    assert sorted(np.concatenate([p.pieces for p in packs]).tolist()) == list(range(len(source.lengths)))
    first = [int(np.searchsorted(source.starts, p.pieces[0], side="right")) - 1 for p in packs[:3]]
    assert sorted(first) == [0, 1, 1]  # the first turns of the cycle that training has
    options = {"key": 1, "pack_tokens": 24, "masking_probability": 0.1, "mask_id": MASK, "max_packs": None}
    tokens = [b.tokens for b in evaluation_batches(source, dp_rank=0, dp_size=1, **options)]
    assert sum(len(t) for t in tokens) == source.lengths.sum()
