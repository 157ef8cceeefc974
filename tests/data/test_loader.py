import dataclasses
import gc
import itertools
import threading
import time

import numpy as np
import pytest
import torch
from dataset_builder import MASK, PAD, ArrayPieces, document, random_conversations, write_dataset

from rxt_dist.data.lane_loader import LaneLoader
from rxt_dist.data.loader import TextLoader, evaluation_batches
from rxt_dist.data.mixing import MixCursor
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.prefetch import Prefetcher
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError, DataError

PACKS, PACK_TOKENS, KEY = 8, 48, 99
TENSORS = (
    "tokens",
    "masked_tokens",
    "masked_index",
    "masked_targets",
    "next_index",
    "next_targets",
    "token_keys",
)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    documents = [document(2 + (i * 11) % 70, seed=i) for i in range(40)]
    return write_dataset(tmp_path_factory.mktemp("text"), "text", documents[:33], documents[33:])


@pytest.fixture(scope="module")
def sources(text_folder, tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("talk"), "conversations", random_conversations(30, seed=1))
    return {
        "text": TextPieces(Dataset(text_folder, "train"), 32),
        "interactions": InteractionPieces(Dataset(folder, "train"), 16),
    }


def loader(source, *, dp_rank=0, dp_size=1, micro_packs=None, **options):
    options = {"masking_probability": 0.15, "key": KEY, "packs": PACKS, "pack_tokens": PACK_TOKENS} | options
    return TextLoader(
        source,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_packs=micro_packs or options["packs"] // dp_size,
        mask_id=MASK,
        **options,
    )


def global_steps(source, steps, *, dp_size=1, micro_packs=None, cursor=None):
    """What all ranks together hold in each step: tensors in global order, counts, cursor."""
    result = []
    loaders = [
        loader(source, dp_rank=r, dp_size=dp_size, micro_packs=micro_packs, cursor=cursor)
        for r in range(dp_size)
    ]
    for _ in range(steps):
        parts = [next(one) for one in loaders]
        assert all(p.counts == parts[0].counts and p.cursor == parts[0].cursor for p in parts)
        batches = [b for p in parts for b in p.batches]
        content = {name: [] for name in TENSORS}
        offset = 0
        for batch in batches:
            for name in TENSORS:
                content[name] += (getattr(batch, name) + (offset if name.endswith("index") else 0)).tolist()
            offset += len(batch.tokens)
        lengths = [n for b in batches for n in b.layout.cu_seqlens.diff().tolist()]
        result.append((content, lengths, parts[0].counts, parts[0].cursor))
    for one in loaders:
        one.close()
    return result


@pytest.mark.parametrize("kind", ["text", "interactions"])
@pytest.mark.parametrize(("dp_size", "micro_packs"), [(1, 1), (1, 4), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)])
def test_the_global_step_is_the_same_on_every_layout(sources, kind, dp_size, micro_packs):
    expected = global_steps(sources[kind], 6)
    found = global_steps(sources[kind], 6, dp_size=dp_size, micro_packs=micro_packs)
    assert found == expected
    for content, lengths, counts, _ in found:
        assert counts == {
            "tokens": len(content["tokens"]),
            "masked": len(content["masked_index"]),
            "next": len(content["next_index"]),
        }
        assert sum(lengths) == len(content["tokens"])
        assert counts["masked"] > 0
        assert counts["next"] > 0
    assert found[-1][3].epoch > 0  # the steps crossed an epoch


@pytest.mark.parametrize(("dp_size", "micro_packs"), [(1, 8), (2, 2), (4, 1)])
@pytest.mark.parametrize("done", [1, 3])
def test_resume_at_another_layout_continues_the_same_sequence(sources, dp_size, micro_packs, done):
    expected = global_steps(sources["text"], 7)
    first = global_steps(sources["text"], done, dp_size=2)
    cursor = MixCursor.from_dict(first[-1][3].to_dict())
    rest = global_steps(sources["text"], 7 - done, dp_size=dp_size, micro_packs=micro_packs, cursor=cursor)
    assert first + rest == expected


def test_the_number_of_micro_batches_and_their_packs(sources):
    with loader(sources["text"], dp_rank=1, dp_size=2, micro_packs=2) as one:
        step = next(one)
    assert len(step.batches) == 2
    assert all(PACK_TOKENS < len(b.tokens) <= 2 * PACK_TOKENS for b in step.batches)
    assert step.wait_seconds > 0


@pytest.mark.parametrize(
    ("packs", "dp_size", "micro_packs"), [(8, 3, 1), (8, 2, 3), (4, 8, 1), (0, 1, 1), (8, 1, -1)]
)
def test_packs_that_do_not_divide_are_refused(sources, packs, dp_size, micro_packs):
    with pytest.raises(ConfigError, match=r"batch\.packs"):
        loader(sources["text"], packs=packs, dp_size=dp_size, micro_packs=micro_packs)


def test_pieces_longer_than_the_pack_are_refused(sources):
    with pytest.raises(DataError, match=r"batch\.pack_tokens: 31 is less than the longest piece"):
        loader(sources["text"], pack_tokens=31)
    with pytest.raises(DataError, match=r"batch\.pack_tokens"):
        list(evaluate(sources["text"], pack_tokens=31))


def test_pinning_is_ignored_without_a_device(sources):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    with loader(sources["text"], pin_memory=True) as one:
        assert not next(one).batches[0].tokens.is_pinned()


# --- the background thread --------------------------------------------------------------------------------


class Recorder(ArrayPieces):
    """Counts reads; the read number ``fail_at`` raises."""

    def __init__(self, fail_at=None):
        super().__init__([4] * 50)
        self.reads, self.fail_at = 0, fail_at

    def read_tokens(self, pieces):
        self.reads += 1
        if self.reads == self.fail_at:
            raise DataError("train/rxt-train-000003.tar is damaged: block 5")
        return super().read_tokens(pieces)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "rxt-prefetch"]


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_steps_are_prepared_ahead_but_not_further(monkeypatch):
    source = Recorder()
    with loader(source, packs=1, pack_tokens=8, prefetch_steps=3) as one:
        wait_until(lambda: source.reads >= 4)  # 3 in the queue, 1 waiting to be put
        time.sleep(0.3)
        assert source.reads == 4
        next(one)
        wait_until(lambda: source.reads == 5)


def test_without_prefetching_nothing_is_read_ahead_and_there_is_no_thread():
    before, source = len(prefetch_threads()), Recorder()
    expected = loader(Recorder(), packs=1, pack_tokens=8)
    with loader(source, packs=1, pack_tokens=8, prefetch_steps=0) as one, expected:
        for number in range(3):
            assert source.reads == number
            assert len(prefetch_threads()) == before + 1  # that of the other loader
            found, same = next(one), next(expected)
            assert found.batches[0].tokens.tolist() == same.batches[0].tokens.tolist()
            assert found.cursor == same.cursor
            assert found.wait_seconds > 0
    with pytest.raises(RuntimeError, match="closed"):
        next(one)


@pytest.mark.parametrize("prefetch_steps", [0, 1, 2])
def test_errors_arrive_in_their_place_and_stay(prefetch_steps):
    options = {"packs": 1, "pack_tokens": 8, "prefetch_steps": prefetch_steps}
    with loader(Recorder(fail_at=3), **options) as one:
        next(one)
        next(one)
        for _ in range(2):
            with pytest.raises(DataError, match=r"rxt-train-000003\.tar is damaged: block 5"):
                next(one)


def test_a_damaged_block_stops_the_loader_with_its_name(tmp_path):
    folder = write_dataset(tmp_path, "text", [document(30, seed=i) for i in range(6)])
    shard = folder / "train" / "rxt-train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    one = loader(TextPieces(Dataset(folder, "train"), 32), packs=1)
    with one, pytest.raises(DataError, match=r"rxt-train-000000\.tar is damaged: block 0"):
        list(itertools.islice(one, 10))


def test_close_stops_the_thread_and_may_be_repeated():
    before = len(prefetch_threads())
    one = loader(Recorder(), packs=1, pack_tokens=8)
    next(one)
    assert len(prefetch_threads()) == before + 1
    one.close()
    one.close()
    assert len(prefetch_threads()) == before
    with pytest.raises(RuntimeError, match="closed"):
        next(one)


def test_an_abandoned_loader_stops_its_thread():
    gc.collect()
    before = len(prefetch_threads())
    one = loader(Recorder(), packs=1, pack_tokens=8)
    next(one)
    del one
    gc.collect()
    wait_until(lambda: len(prefetch_threads()) == before)


def test_wait_seconds_is_the_time_waited():
    def slow():
        for i in range(3):
            time.sleep(0.2)
            yield i

    prefetcher = Prefetcher(slow(), depth=1)
    item, waited = prefetcher.get()
    assert (item, waited > 0.15) == (0, True)
    time.sleep(0.5)
    item, waited = prefetcher.get()
    assert (item, waited < 0.1) == (1, True)
    assert prefetcher.get()[0] == 2
    with pytest.raises(StopIteration):
        prefetcher.get()
    prefetcher.close()


def test_an_end_is_an_end_without_a_thread_too():
    prefetcher = Prefetcher(iter([1, 2]), depth=0)
    assert [prefetcher.get()[0], prefetcher.get()[0]] == [1, 2]
    for _ in range(2):
        with pytest.raises(StopIteration):
            prefetcher.get()
    prefetcher.close()


# --- pinned memory ----------------------------------------------------------------------------------------


def tensors_in(value):
    """Every tensor of a batch, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def batches_of_every_kind(sources):
    options = {"dp_rank": 0, "dp_size": 1, "pin_memory": True}
    with loader(sources["text"], pin_memory=True) as one:
        yield from next(one).batches
    lanes = {"key": 1, "lanes": 4, "micro_lanes": 2, "window": 2, "pad_id": PAD, "stm_size": 4}
    with LaneLoader(sources["interactions"], **lanes, **options) as one:
        yield from next(one).batches


def test_every_tensor_of_a_batch_is_pinned(sources, monkeypatch):
    """As far as that can be seen without a device: each of them is what pinning returned."""
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    found = [tensor for batch in batches_of_every_kind(sources) for tensor in tensors_in(batch)]
    assert len(found) > 50
    known = {id(tensor) for tensor in pinned}
    assert all(id(tensor) in known for tensor in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_tensor_of_a_batch_is_in_page_locked_memory(sources):
    found = [tensor for batch in batches_of_every_kind(sources) for tensor in tensors_in(batch)]
    assert all(tensor.is_pinned() for tensor in found if tensor.numel())
    assert sum(tensor.numel() > 0 for tensor in found) > 50


# --- evaluation -------------------------------------------------------------------------------------------


def evaluate(source, *, dp_rank=0, dp_size=1, max_packs=None, pack_tokens=PACK_TOKENS):
    return evaluation_batches(
        source,
        key=KEY,
        pack_tokens=pack_tokens,
        dp_rank=dp_rank,
        dp_size=dp_size,
        masking_probability=0.15,
        mask_id=MASK,
        max_packs=max_packs,
    )


@pytest.mark.parametrize("max_packs", [None, 5, 1, 1000])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_evaluation_has_the_same_content_for_every_dp(sources, dp_size, max_packs):
    expected = list(evaluate(sources["text"], max_packs=max_packs))
    assert all(batch is not None for batch in expected)
    ranks = [
        list(evaluate(sources["text"], dp_rank=r, dp_size=dp_size, max_packs=max_packs))
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [batch for row in zip(*ranks, strict=True) for batch in row]
    assert all(batch is None for batch in dealt[len(expected) :])
    for batch, same in zip(dealt, expected, strict=False):
        assert all(torch.equal(getattr(batch, name), getattr(same, name)) for name in TENSORS)


def test_evaluation_covers_the_split_once_in_index_order(sources):
    source = sources["text"]
    tokens = torch.cat([batch.tokens for batch in evaluate(source)])
    assert tokens.tolist() == source.read_tokens(np.arange(len(source.lengths))).tolist()


def test_evaluation_of_a_validation_split(text_folder):
    source = TextPieces(Dataset(text_folder, "val"), 32)
    assert sum(len(batch.tokens) for batch in evaluate(source)) == source.lengths.sum()
