"""The index of a shard, at the level of bytes: both versions, sizes, damage."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_builder import conversation
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data.format import ConversationTokens, ShardWriter, token_dtype
from rxt_dist.data.index import BLOCK_DTYPE, IndexFile, ShardIndex, join_indices
from rxt_dist.errors import DataError

U16 = token_dtype(1000)
Lengths = list[tuple[int, list[tuple[int, int]]]]
"""Of every conversation: tokens of its system text, and of each query and answer."""

lengths = st.lists(
    st.tuples(
        st.integers(0, 400), st.lists(st.tuples(st.integers(1, 70_000), st.integers(1, 300)), min_size=1)
    ),
    min_size=1,
    max_size=6,
)


def columns_of(conversations: Lengths) -> dict[str, list[int]]:
    return {
        "document_tokens": [system + sum(map(sum, pairs)) for system, pairs in conversations],
        "interactions": [len(pairs) for _, pairs in conversations],
        "system_tokens": [system for system, _ in conversations],
        "query_tokens": [query for _, pairs in conversations for query, _ in pairs],
        "answer_tokens": [answer for _, pairs in conversations for _, answer in pairs],
    }


def index_bytes(
    kind: str, version: int, block: tuple[int, ...], arrays: Sequence[tuple[str, Sequence[int], str | None]]
) -> bytes:
    """An index as docs/data-format.md describes it: arrays of (name, values, struct code; None: no bytes)."""
    sizes = {"B": 1, "H": 2, "I": 4}
    entries: list[list[Any]] = [["blocks", 1] if version == 1 else ["blocks", 1, 32]]
    data = struct.pack("<QQIQI", *block)
    for name, values, code in arrays:
        entries.append([name, len(values)] if version == 1 else [name, len(values), sizes.get(code or "", 0)])
        data += struct.pack(f"<{len(values)}{code}", *values) if code else b""
    content = {"kind": kind, "dtype": "uint16", "arrays": entries}
    header = json.dumps(content, separators=(",", ":")).encode()
    whole = b"RXTINDEX" + struct.pack("<II", version, len(header)) + header + data
    return whole + struct.pack("<I", zlib.crc32(whole))


def parsed(data: bytes, name: str) -> ShardIndex:
    file = IndexFile(data, name)
    return join_indices([file], file.header.kind, file.header.dtype)


def block_of(columns: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    return (512, 4096, len(columns["document_tokens"]), sum(columns["document_tokens"]), 77)


def assert_index(index: ShardIndex, columns: Mapping[str, Sequence[int]]) -> None:
    for name, values in columns.items():
        found = getattr(index, name)
        assert found.dtype == np.uint32
        assert found.tolist() == values
    assert [row.tolist() for row in index.blocks] == [block_of(columns)]


@given(lengths)
def test_indices_of_the_first_version_are_read(conversations: Lengths) -> None:
    """All lengths in four bytes, and those of conversations besides those of their segments."""
    columns = columns_of(conversations)
    arrays = [(name, values, "I") for name, values in columns.items()]
    assert_index(parsed(index_bytes("conversations", 1, block_of(columns), arrays), "x"), columns)
    text = {"document_tokens": columns["document_tokens"]}
    assert_index(
        parsed(index_bytes("text", 1, block_of(text), [(*next(iter(text.items())), "I")]), "x"),
        text,
    )


def narrow(values: Sequence[int]) -> str | None:
    largest = max(values)
    return None if largest == 0 else "B" if largest < 256 else "H" if largest < 65_536 else "I"


@settings(deadline=None)
@given(lengths)
def test_written_indices_are_those_of_the_description(
    tmp_path_factory: pytest.TempPathFactory, conversations: Lengths
) -> None:
    columns = columns_of(conversations)
    stored = [(name, values, narrow(values)) for name, values in list(columns.items())[1:]]
    expected = index_bytes("conversations", 2, block_of(columns), stored)
    index = parsed(expected, "x")
    assert_index(index, columns)
    path = tmp_path_factory.mktemp("index") / "a.idx"
    index.write(path)
    assert path.read_bytes() == expected
    assert_index(ShardIndex.read(path), columns)


def shard_index(folder: Path, conversations: Sequence[ConversationTokens], **options: int) -> Path:
    """The index of a shard of ``conversations``."""
    path = folder / "train" / "rxt-train-000000.tar"
    path.parent.mkdir(parents=True)
    with ShardWriter(path, "conversations", U16, 0, **options) as writer:
        for item in conversations:
            writer.add(item)
        writer.close()
    return path.with_suffix(".idx")


def test_short_conversations_take_a_byte_a_length(tmp_path: Path) -> None:
    turns = [([9] * 10, [9] * 8), ([9] * 12, [9] * 9)]
    size = shard_index(tmp_path, [conversation(turns)] * 1000).stat().st_size
    assert size < 300 + 4 * 32 + 1000 * (1 + 2 * 2)  # header, blocks, interactions and their two lengths


def test_joined_indices(tmp_path: Path) -> None:
    parts = []
    for number, system in enumerate(([], [8, 9])):
        talks = [conversation([([7] * turns, [8])] * turns, system) for turns in range(1, 4)]
        parts.append(IndexFile.read(shard_index(tmp_path / str(number), talks, block_documents=2)))
    joined = join_indices(parts, "conversations", U16)
    assert joined.blocks["documents"].tolist() == [2, 1, 2, 1]
    assert joined.system_tokens is not None
    assert joined.system_tokens.tolist() == [0, 0, 0, 3, 3, 3]
    joined.write(tmp_path / "joined.idx")
    again = ShardIndex.read(tmp_path / "joined.idx")
    alone = [ShardIndex.read(part.name) for part in parts]
    for name in ("document_tokens", "interactions", "query_tokens", "answer_tokens"):
        whole = np.concatenate([getattr(part, name) for part in alone])
        assert np.array_equal(getattr(joined, name), whole)
        assert np.array_equal(getattr(again, name), whole)
    nothing = join_indices([], "text", U16)
    assert (len(nothing.blocks), len(nothing.document_tokens), nothing.interactions) == (0, 0, None)


def test_of_joined_indices_the_one_that_contradicts_itself_is_named() -> None:
    columns = columns_of([(0, [(3, 4)])])
    arrays = [(name, values, "B") for name, values in list(columns.items())[1:]]
    good = index_bytes("conversations", 2, block_of(columns), arrays)
    bad = index_bytes("conversations", 2, (512, 4096, 1, 9, 77), arrays)
    files = [IndexFile(data, name) for data, name in ((good, "a"), (bad, "b"), (good, "c"))]
    with pytest.raises(DataError, match="b is damaged: tokens of the blocks do not add up"):
        join_indices(files, "conversations", U16)
    with pytest.raises(DataError, match="a is an index of conversations in uint16, expected text in uint16"):
        join_indices(files, "text", U16)


def test_large_indices_are_read_whole(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(1, 60_000, 100_000).astype(np.uint32)
    blocks = np.array([(0, 1, len(tokens), int(tokens.sum()), 3)], BLOCK_DTYPE)
    ShardIndex("text", U16, blocks, tokens).write(tmp_path / "a.idx")
    assert np.array_equal(ShardIndex.read(tmp_path / "a.idx").document_tokens, tokens)
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.idx is damaged: it has 200\d+ bytes, its header implies"):
        ShardIndex.read(tmp_path / "a.idx")


def index_file(tmp_path: Path) -> Path:
    return shard_index(tmp_path, [conversation([([7], [8, 9])])])


@pytest.mark.parametrize("size", [0, 3, 15, 40, -1])
def test_a_cut_index_is_refused(tmp_path: Path, size: int) -> None:
    path = index_file(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"rxt-train-000000\.idx is damaged"):
        ShardIndex.read(path)


def test_every_flipped_byte_of_an_index_is_found(tmp_path: Path) -> None:
    path = index_file(tmp_path)
    good = path.read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(DataError, match="damaged"):
            ShardIndex.read(path)


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    path = index_file(tmp_path)
    data = bytearray(path.read_bytes()[:-4])
    data[8] = 9
    path.write_bytes(data + struct.pack("<I", zlib.crc32(data)))
    with pytest.raises(DataError, match="index version 9; this version of rxt-dist reads 1 and 2"):
        ShardIndex.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interactions": [2]}, "interactions do not add up"),
        ({"query_tokens": [3, 3]}, "interactions do not add up"),
        ({"answer_tokens": []}, "interactions do not add up"),
        ({"answer_tokens": [5]}, "tokens of the blocks do not add up"),
        ({"system_tokens": []}, "differ in length"),
        ({"system_tokens": [0], "interactions": [1, 0]}, "differ in length"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(change: dict[str, list[int]], message: str) -> None:
    columns = columns_of([(0, [(3, 4)])])
    arrays = [(name, change.get(name, values), "I") for name, values in list(columns.items())[1:]]
    with pytest.raises(DataError, match=message):
        parsed(index_bytes("conversations", 2, block_of(columns), arrays), "x")


def test_contradictions_of_the_first_version_and_of_blocks(tmp_path: Path) -> None:
    columns = columns_of([(0, [(3, 4)])])
    arrays = [(name, [8] if name == "document_tokens" else values, "I") for name, values in columns.items()]
    with pytest.raises(DataError, match="tokens of the segments do not add up"):
        parsed(index_bytes("conversations", 1, (0, 9, 1, 8, 0), arrays), "x")
    with pytest.raises(DataError, match="documents of the blocks do not add up"):
        parsed(index_bytes("text", 2, (0, 9, 2, 5, 0), [("document_tokens", [5], "B")]), "x")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([["document_tokens", 1 << 40, 0]], "document_tokens with 0 bytes a length"),
        ([["document_tokens", 1, 3]], "document_tokens with 3 bytes a length"),
        ([["document_tokens", -1, 1]], "negative length"),
        ([["document_tokens", 1 << 40, 4]], "its header implies"),
        ([["tokens", 1, 1]], "unknown arrays"),
        ([["document_tokens", "1", 1]], "malformed"),
        ([["document_tokens", 1]], "malformed"),
        ([], "unknown arrays"),
        (None, "malformed"),
    ],
)
def test_hostile_headers_allocate_nothing(arrays: Any, message: str) -> None:
    entries = None if arrays is None else [["blocks", 0, 32], *arrays]
    header = json.dumps({"kind": "text", "dtype": "uint16", "arrays": entries}).encode()
    whole = b"RXTINDEX" + struct.pack("<II", 2, len(header)) + header
    with pytest.raises(DataError, match=f"x is damaged: .*{message}"):
        parsed(whole + struct.pack("<I", zlib.crc32(whole)), "x")


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx: cannot read the index"):
        ShardIndex.read(tmp_path / "nowhere.idx")
