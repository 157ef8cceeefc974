"""Random damage to the bytes of a dataset is reported or harmless: no crash and no huge allocation."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from dataset_builder import document, random_conversations, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxt_dist.data.format import ConversationBlock, ShardIndex, read_block
from rxt_dist.data.manifest import fingerprint_of, load_manifest, write_manifest
from rxt_dist.data.reader import Dataset
from rxt_dist.data.tokens import tokenizer_sha256
from rxt_dist.data.verify import verify_dataset
from rxt_dist.errors import DataError

MAX_ALLOCATION = 8 << 20
"""Bytes; the files of the dataset have at most 100,000."""


@pytest.fixture(scope="module", params=[("text", 2), ("conversations", 2), ("conversations", 1)])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, format_version = request.param
    folder = tmp_path_factory.mktemp(kind) / "data"
    if kind == "text":
        items: list[object] = [document(5 + 7 * (i % 9), seed=i) for i in range(30)]
    else:
        items = list(random_conversations(30, seed=1))
    write_dataset(folder, kind, items[:24], items[24:], format_version=format_version)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    manifest = load_manifest(folder).model_copy(
        update={"tokenizer_sha256": tokenizer_sha256(folder / "tokenizer")}
    )
    write_manifest(folder, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))
    assert verify_dataset(folder, deep=True) == []
    return folder


def everything(folder: Path) -> list[object]:
    """All tokens, roles and marks of both splits, through the blocks and through the reader of training."""
    manifest = load_manifest(folder)
    found: list[object] = []
    for shard in manifest.shards:
        index = ShardIndex.read(shard.index_path_in(folder))
        data = shard.path_in(folder).read_bytes()
        for number in range(len(index.blocks)):
            block = read_block(data, index, number)
            found.append(block.tokens.tolist())
            if isinstance(block, ConversationBlock):
                found += [block.roles.tolist(), block.segment_starts.tolist()]
                found.append(None if block.marks is None else block.marks.tolist())
    for split in ("train", "val"):
        dataset = Dataset(folder, split)
        numbers = np.arange(dataset.num_documents)
        found.append(
            dataset.read_spans(numbers, np.zeros(len(numbers), np.int64), dataset.document_tokens).tolist()
        )
    return found


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_damage_is_reported_or_harmless(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(data.draw(st.integers(1, 3), label="damages")):
        path = data.draw(st.sampled_from(files), label="file")
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1), label="place")
        patch = data.draw(st.binary(min_size=1, max_size=12), label="bytes")
        content[place : place + len(patch)] = patch
        path.write_bytes(content)
    tracemalloc.start()
    try:
        problems = verify_dataset(folder, deep=True)
        try:
            found = everything(folder)
        except DataError:
            found = []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert problems or found == everything(pristine)
    assert peak < MAX_ALLOCATION


def indices(folder: Path) -> list[str]:
    """Of the first training shard and, in version 2, of the split."""
    names = ("rxt-train-000000.idx", "rxt-train.idx")
    return [name for name in names if (folder / "train" / name).is_file()]


@pytest.mark.parametrize("field", ["documents", "tokens", "bytes"])
def test_absurd_numbers_in_an_index_are_refused_before_allocation(
    pristine: Path, tmp_path: Path, field: str
) -> None:
    """A correct crc32 over a claim of 2**31 and more: what a fuzzer will not find."""
    for name in indices(pristine):
        folder = Path(shutil.copytree(pristine, tmp_path / name))
        path = folder / "train" / name
        index = ShardIndex.read(path)
        blocks = index.blocks.copy()
        blocks[field][0] = (1 << 31) + 7
        ShardIndex(**{**vars(index), "blocks": blocks}).write(path)
        tracemalloc.start()
        try:
            problems = verify_dataset(folder, deep=True)
            with pytest.raises(DataError):
                everything(folder)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert any(name in problem for problem in problems)
        assert peak < MAX_ALLOCATION


def test_an_index_of_absurd_size_is_not_read(pristine: Path, tmp_path: Path) -> None:
    for name in indices(pristine):
        folder = Path(shutil.copytree(pristine, tmp_path / name))
        with (folder / "train" / name).open("r+b") as file:
            file.truncate(64 << 30)  # sparse: takes no place on the disk
        tracemalloc.start()
        try:
            problems = verify_dataset(folder, deep=True)
            with pytest.raises(DataError, match="its header implies"):
                everything(folder)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert any(f"{name} is damaged" in p and "its header implies" in p for p in problems)
        assert peak < MAX_ALLOCATION
