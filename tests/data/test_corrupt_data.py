"""Every kind of damage under both policies: an error before a wrong token is delivered, or left out."""

import itertools
import re
import shutil

import numpy as np
import pytest
from dataset_builder import MASK, PAD, document, random_conversations, write_dataset

from rxt_dist.data.format import ShardIndex
from rxt_dist.data.lane_loader import LaneLoader
from rxt_dist.data.loader import TextLoader, evaluation_batches
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import DataError

DOCUMENTS = [document(40, seed=i) for i in range(27)]  # all equally long, so that shards have the same size
SECOND = range(9, 18)  # documents of the second of three shards; blocks of 3


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("intact"), "text", DOCUMENTS, documents_per_shard=9)


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "data")


def shard_of(folder, number):
    path = folder / "train" / f"rxt-train-{number:06d}.tar"
    path.chmod(0o644)
    return path


def overwrite(folder, block, inside, content):
    """Bytes of a block of the second shard; ``inside`` counts from its start, from its end if negative."""
    path = shard_of(folder, 1)
    row = ShardIndex.read(path.with_suffix(".idx")).blocks[block]
    data = bytearray(path.read_bytes())
    start = int(row["offset"]) + inside + (int(row["bytes"]) if inside < 0 else 0)
    data[start : start + len(content)] = content
    path.write_bytes(data)


def flip(inside):
    def change(folder):
        path = shard_of(folder, 1)
        row = ShardIndex.read(path.with_suffix(".idx")).blocks[1]
        place = int(row["offset"]) + inside
        overwrite(folder, 1, inside, bytes([path.read_bytes()[place] ^ 16]))

    return change


def cut(at_boundary):
    def change(folder):
        path = shard_of(folder, 1)
        row = ShardIndex.read(path.with_suffix(".idx")).blocks[1]
        path.write_bytes(path.read_bytes()[: int(row["offset"]) + (0 if at_boundary else 700)])

    return change


def swap(folder):
    first, second = shard_of(folder, 0), shard_of(folder, 1)
    assert first.stat().st_size == second.stat().st_size
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


DAMAGE = {
    # name: what is done, the documents that cannot be read any more
    "bit of a tar header": (flip(3), range(12, 15)),
    "bit of the payload": (flip(1600), range(12, 15)),
    "bit of the lengths": (flip(515), range(12, 15)),
    "zeroed header": (lambda folder: overwrite(folder, 1, 0, bytes(512)), range(12, 15)),
    "zero hole in the payload": (lambda folder: overwrite(folder, 1, 1540, bytes(100)), range(12, 15)),
    "over two blocks": (lambda folder: overwrite(folder, 1, -64, b"\xa5" * 128), range(12, 18)),
    "cut at a member": (cut(True), SECOND),
    "cut inside a member": (cut(False), SECOND),
    "grown": (lambda folder: overwrite(folder, 2, 0, bytes(20_000)), SECOND),
    "empty": (lambda folder: shard_of(folder, 1).write_bytes(b""), SECOND),
    "missing": (lambda folder: shard_of(folder, 1).unlink(), SECOND),
    "garbage": (lambda folder: shard_of(folder, 1).write_bytes(b"\x5a" * 777), SECOND),
    "swapped shards": (swap, range(18)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_exactly_the_damaged_documents_are_lost(folder, name):
    change, lost = DAMAGE[name]
    change(folder)
    dataset = Dataset(folder, "train", skip_corrupt=True)
    order = np.random.default_rng(0).permutation(27)
    assert sorted(order[dataset.lost(order)].tolist()) == list(lost)
    for i in range(27):
        if i in lost:
            with pytest.raises(DataError, match="rxt-train-00000"):
                dataset.text_document(i)
        else:
            assert dataset.text_document(i).tolist() == DOCUMENTS[i].tolist()
    assert len(dataset.damage()) == len(lost) // 3
    assert all(re.search(r"rxt-train-00000\d\.tar", sentence) for sentence in dataset.damage().values())


@pytest.mark.parametrize("name", DAMAGE)
def test_by_default_damage_is_an_error_that_names_the_shard(folder, name):
    change, lost = DAMAGE[name]
    change(folder)
    refused = []
    for i in range(27):
        try:
            found = Dataset(folder, "train").text_document(i).tolist()
        except DataError as error:
            found, sentence = None, str(error)
            refused.append(re.search(r"rxt-train-00000\d\.tar", sentence) and i)
        assert found in (None, DOCUMENTS[i].tolist())
    assert set(lost) <= set(refused)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "damage", ["bit", "cut", "of another part", "of another dataset", "missing", "empty"]
)
@pytest.mark.parametrize(("format_version", "name"), [(1, "rxt-train-000001.idx"), (2, "rxt-train.idx")])
def test_without_its_index_a_dataset_is_always_an_error(tmp_path, format_version, name, damage, skip):
    """Version 1 is planned from the indices of the shards, version 2 from that of the split."""
    options = {"documents_per_shard": 9, "format_version": format_version}
    folder = write_dataset(tmp_path / "data", "text", DOCUMENTS, DOCUMENTS[::-1], **options)
    assert Dataset(folder, "train").text_document(13).tolist() == DOCUMENTS[13].tolist()
    path = folder / "train" / name
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-40] ^= 1
    elif damage == "cut":
        data = data[:-1]
    elif damage == "of another part":  # the same counts and sizes
        other = "train/rxt-train-000000.idx" if format_version == 1 else "val/rxt-val.idx"
        data = (folder / other).read_bytes()
    elif damage == "of another dataset":
        others = [document(40, seed=99 + i) for i in range(27)]
        data = (write_dataset(tmp_path / "other", "text", others, **options) / "train" / name).read_bytes()
    path.write_bytes(b"" if damage == "empty" else data)
    if damage == "missing":
        path.unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        Dataset(folder, "train", skip_corrupt=skip)


def test_with_the_index_of_the_split_those_of_shards_are_not_read(folder):
    for path in folder.glob("*/rxt-*-0*.idx"):
        path.unlink()
    dataset = Dataset(folder, "train")
    assert [dataset.text_document(i).tolist() for i in range(27)] == [d.tolist() for d in DOCUMENTS]


def test_blocks_can_be_lost_without_looking(intact):
    dataset = Dataset(intact, "train", skip_corrupt=True)
    dataset.lose([4])
    assert np.flatnonzero(dataset.lost(np.arange(27))).tolist() == [12, 13, 14]
    with pytest.raises(DataError, match=r"rxt-train-000001\.tar was damaged: block 1"):
        dataset.text_document(13)
    for block in (-1, 9):
        with pytest.raises(DataError, match=f"has 9 blocks, found {block}"):
            dataset.lose([block])


# --- steps ------------------------------------------------------------------------------------------------

PACKS = 8


def text_steps(folder, dp_size, steps, micro_packs=1):
    """Per step: batches of all ranks, global counts less what is lost, what is lost, and the cursor."""
    source = TextPieces(Dataset(folder, "train", skip_corrupt=True), 32)
    loaders = [
        TextLoader(
            source,
            key=5,
            packs=PACKS,
            pack_tokens=64,
            micro_packs=micro_packs,
            dp_rank=rank,
            dp_size=dp_size,
            masking_probability=0.3,
            mask_id=MASK,
        )
        for rank in range(dp_size)
    ]
    found = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        assert all(part.counts == parts[0].counts and part.cursor == parts[0].cursor for part in parts)
        lost = {name: sum(part.lost[name] for part in parts) for name in parts[0].counts}
        batches = [batch for part in parts for batch in part.batches]
        counts = {name: parts[0].counts[name] - lost[name] for name in lost}
        found.append((batches, counts, lost, parts[0].cursor))
    for loader in loaders:
        loader.close()
    return found


def sequences(batches):
    """Every sequence of the batches: its tokens, keys, masked and supervised targets."""
    found = []
    for batch in batches:
        cuts = batch.layout.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(cuts):
            row = [batch.tokens[start:stop].tolist(), batch.token_keys[start:stop].tolist()]
            for index, targets in (
                (batch.masked_index, batch.masked_targets),
                (batch.next_index, batch.next_targets),
            ):
                inside = (index >= start) & (index < stop)
                row.append(list(zip((index[inside] - start).tolist(), targets[inside].tolist(), strict=True)))
            found.append(row)
    return found


@pytest.mark.parametrize("micro_packs", [1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_step_is_the_intact_one_less_the_lost_pieces(intact, folder, dp_size, micro_packs):
    DAMAGE["bit of the payload"][0](folder)
    gone = [DOCUMENTS[i][s : s + 32].tolist() for i in (12, 13, 14) for s in (0, 32)]
    whole = text_steps(intact, 1, 6)
    some = text_steps(folder, dp_size, 6, micro_packs)
    total = 0
    for (batches, counts, lost, cursor), (other, _, nothing, same) in zip(some, whole, strict=True):
        kept = [row for row in sequences(other) if row[0] not in gone]
        found = [row for row in sequences(batches) if row[0] != [MASK]]
        assert found == kept
        assert cursor == same
        assert not any(nothing.values())
        assert counts == {
            "tokens": sum(len(row[0]) for row in found),
            "masked": sum(len(row[2]) for row in found),
            "next": sum(len(row[3]) for row in found),
        }
        total += lost["tokens"]
    assert total >= 2 * 3 * 40  # the steps go through more than two epochs


def test_a_micro_batch_of_which_nothing_is_left_is_one_mask_token(tmp_path):
    folder = write_dataset(tmp_path, "text", DOCUMENTS[:3])
    shard_of(folder, 0).unlink()
    (batches, counts, lost, _), *_ = text_steps(folder, 1, 1)
    assert [batch.tokens.tolist() for batch in batches] == [[MASK]] * PACKS
    assert sum(batch.masked_index.numel() + batch.next_index.numel() for batch in batches) == 0
    assert counts == {"tokens": 0, "masked": 0, "next": 0}
    assert lost["tokens"] > 0


def test_evaluation_leaves_out_what_is_lost(folder):
    def tokens(dp_size):
        source = TextPieces(Dataset(folder, "train", skip_corrupt=True), 64)
        options = {"key": 1, "pack_tokens": 120, "masking_probability": 0.1, "mask_id": MASK}
        ranks = [
            list(evaluation_batches(source, dp_rank=r, dp_size=dp_size, max_packs=None, **options))
            for r in range(dp_size)
        ]
        batches = [b for row in zip(*ranks, strict=True) for b in row]
        assert None in batches  # packs of three documents: one of them is lost as a whole
        return [t for b in batches if b is not None for t in b.tokens.tolist()]

    DAMAGE["bit of the payload"][0](folder)
    expected = [t for i, d in enumerate(DOCUMENTS) if i not in (12, 13, 14) for t in d.tolist()]
    assert tokens(1) == expected
    assert tokens(2) == expected


LANES, WINDOW = 8, 3


def lane_steps(folder, dp_size, steps, skip=True):
    source = InteractionPieces(Dataset(folder, "train", skip_corrupt=skip), 64)
    loaders = [
        LaneLoader(
            source,
            key=3,
            lanes=LANES,
            micro_lanes=2,
            window=WINDOW,
            dp_rank=rank,
            dp_size=dp_size,
            pad_id=PAD,
            stm_size=6,
            system_prompts=True,
        )
        for rank in range(dp_size)
    ]
    found = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        assert all(part.state.to_dict() == parts[0].state.to_dict() for part in parts)
        lost = {name: sum(part.lost[name] for part in parts) for name in parts[0].counts}
        batches = [batch for part in parts for batch in part.batches]
        found.append((batches, {name: parts[0].counts[name] - lost[name] for name in lost}))
    for loader in loaders:
        loader.close()
    return found


def cells(batch, part):
    """Every lane of every position: what it reads (None: nothing), whether it resets, visit and number."""
    for at in getattr(batch, part):
        for lane, (start, stop) in enumerate(itertools.pairwise(at.layout.cu_seqlens.tolist())):
            inside = (at.next_index >= start) & (at.next_index < stop)
            read = (
                at.tokens[start:stop].tolist(),
                at.token_keys[start:stop].tolist(),
                at.next_targets[inside].tolist(),
                at.target_marks[inside].tolist(),
            )
            present = bool(at.present[lane])
            if not present:
                assert read[0] == [PAD]
                assert read[2] == []
            yield read if present else None, bool(at.reset[lane]), int(at.visits[lane]), int(at.numbers[lane])


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_lanes_skip_the_conversations_of_a_damaged_block(tmp_path, dp_size):
    talks = random_conversations(21, seed=8)
    intact = write_dataset(tmp_path / "intact", "conversations", talks)
    folder = shutil.copytree(intact, tmp_path / "damaged")
    path = shard_of(folder, 1)
    data = bytearray(path.read_bytes())
    row = ShardIndex.read(path.with_suffix(".idx")).blocks[1]  # conversations 10, 11, 12
    data[int(row["offset"]) + 520] ^= 1
    path.write_bytes(data)
    whole, some = lane_steps(intact, 1, 12), lane_steps(folder, dp_size, 12)
    first = {}  # first interaction of every visit
    for batches, _ in whole:
        for batch in batches:
            first |= {visit: read[0] for read, _, visit, n in cells(batch, "positions") if n == 0}
    begins = [np.concatenate(talk.segments[talk.roles[0] == 0 :][:2]).tolist() for talk in talks]
    gone = {visit for visit, tokens in first.items() if tokens in [begins[i] for i in (10, 11, 12)]}
    assert len(gone) >= 3
    left_out = 0
    for (batches, counts), (other, _) in zip(some, whole, strict=True):
        for part in ("positions", "look_backs"):
            found = [cell for batch in batches for cell in cells(batch, part)]
            expected = [cell for batch in other for cell in cells(batch, part)]
            for (read, reset, visit, number), (was, had_reset, same, number_too) in zip(
                found, expected, strict=True
            ):
                assert (visit, number, reset) == (same, number_too, had_reset)
                assert read == (None if visit in gone else was)
                left_out += was is not None and read is None
        present = [c for batch in batches for c in cells(batch, "positions") if c[0] is not None]
        assert counts == {
            "tokens": sum(len(read[0]) for read, *_ in present),
            "answer": sum(len(read[2]) for read, *_ in present),
            "slots": sum(min(6, len(read[0])) for read, *_ in present),
            "interactions": len(present),
            "resets": sum(reset for _, reset, *_ in present),
        }
    assert left_out > 10


def test_lanes_stop_at_damage_by_default(tmp_path):
    folder = write_dataset(tmp_path, "conversations", random_conversations(6, seed=8))
    path = shard_of(folder, 0)
    data = bytearray(path.read_bytes())
    data[520] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rxt-train-000000\.tar is damaged: block 0"):
        lane_steps(folder, 1, 4, skip=False)
