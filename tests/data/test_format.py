"""Blocks, shard indices and shards, at the level of bytes."""

from __future__ import annotations

import mmap
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data.format import (
    BLOCK_DTYPE,
    ROLE_ANSWER,
    ROLE_QUERY,
    ROLE_SYSTEM,
    ConversationBlock,
    ConversationTokens,
    ShardIndex,
    ShardWriter,
    TextBlock,
    conversation_block,
    decode_conversation_block,
    decode_text_block,
    encode_block,
    read_block,
    text_block,
    token_dtype,
)
from rxt_dist.errors import DataError

U16, U32 = token_dtype(1000), token_dtype(100_000)


def conversation(
    lengths: list[int], *, system: int = 0, first: int = 0, marked: bool = False
) -> ConversationTokens:
    sizes = ([system] if system else []) + lengths
    roles = ([ROLE_SYSTEM] if system else []) + [ROLE_QUERY, ROLE_ANSWER] * (len(lengths) // 2)
    segments = [np.arange(first + i, first + i + n) for i, n in enumerate(sizes)]
    marks = [np.full(n, i % 256, np.uint8) for i, n in enumerate(sizes)] if marked else None
    return ConversationTokens(segments, roles, marks)


def write_shard(
    folder: Path, kind: Any, dtype: Any, documents: list[Any], number: int = 0, **options: int
) -> Path:
    path = folder / "train" / f"rxt-train-{number:06d}.tar"
    path.parent.mkdir(exist_ok=True)
    writer = ShardWriter(path, kind, dtype, number, **options)
    for document in documents:
        writer.add(document)
    writer.close()
    return path


def read_all(path: Path) -> list[TextBlock | ConversationBlock]:
    index = ShardIndex.read(path.with_suffix(".idx"))
    data = path.read_bytes()
    return [read_block(data, index, block) for block in range(len(index.blocks))]


def same_conversation(left: ConversationTokens, right: ConversationTokens) -> bool:
    def equal(a: list[Any] | None, b: list[Any] | None) -> bool:
        if a is None or b is None:
            return a is b
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    return (
        left.roles == right.roles and equal(left.segments, right.segments) and equal(left.marks, right.marks)
    )


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(1, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (200_000, "uint32")]
)
def test_token_dtype_is_the_smallest_that_fits(vocab_size: int, expected: str) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype.name == expected
    assert dtype.str[0] == "<"


@pytest.mark.parametrize("dtype", [U16, U32])
def test_text_block_round_trip(dtype: np.dtype[Any]) -> None:
    documents = [np.arange(n) + 60_000 for n in (1, 5, 3)]
    block = decode_text_block(encode_block(text_block(documents, dtype)), dtype)
    assert block.num_documents == 3
    assert block.document_starts.tolist() == [0, 1, 6, 9]
    for i, document in enumerate(documents):
        assert np.array_equal(block.document(i), document)


def test_bytes_are_little_endian() -> None:
    assert encode_block(text_block([np.array([0x0102])], U16))["tokens.bin"] == b"\x02\x01"
    assert encode_block(text_block([np.array([0x010203])], U32))["tokens.bin"] == b"\x03\x02\x01\x00"


def test_an_id_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="65536 does not fit into uint16"):
        encode_block(text_block([np.array([1, 65_536])], U16))


@pytest.mark.parametrize("dtype", [U16, U32])
def test_conversation_block_round_trip(dtype: np.dtype[Any]) -> None:
    conversations = [
        conversation([2, 3]),
        conversation([4, 1, 2, 2], system=3, marked=True),
        conversation([1, 1]),
    ]
    block = decode_conversation_block(encode_block(conversation_block(conversations, dtype)), dtype)
    assert block.conversation_segments.tolist() == [0, 2, 7, 9]
    assert block.roles.tolist() == [1, 2, 0, 1, 2, 1, 2, 1, 2]
    assert same_conversation(block.document(1), conversations[1])
    unmarked = block.document(0)
    assert unmarked.marks is not None  # one marked conversation gives the whole block marks
    assert not any(marks.any() for marks in unmarked.marks)


def test_marks_are_only_stored_when_there_are_any() -> None:
    members = encode_block(conversation_block([conversation([2, 3])], U16))
    assert "marks.bin" not in members
    assert decode_conversation_block(members, U16).marks is None


@given(st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=20), min_size=1, max_size=10))
def test_any_documents_survive(documents: list[list[int]]) -> None:
    arrays = [np.array(document) for document in documents]
    block = decode_text_block(encode_block(text_block(arrays, U16)), U16)
    assert [block.document(i).tolist() for i in range(block.num_documents)] == documents


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens.bin": b"abc"}, "multiple of 2"),
        ({"tokens.bin": b""}, "sums to"),
        ({"turns.bin": u32(2, 2)}, "turns.bin sums to"),
        ({"turns.bin": u32(0, 5)}, "length of 0"),
        ({"turns.bin": b""}, "no lengths"),
        ({"turns.bin": b"abcde"}, "multiple of 4"),
        ({"turns.bin": u32(5)}, "2 roles for 1 segments"),
        ({"roles.bin": b"\1\2\1"}, "3 roles for 2 segments"),
        ({"roles.bin": b"\2\1"}, "query and answer in turn"),
        ({"roles.bin": b"\1\1"}, "query and answer in turn"),
        ({"roles.bin": b"\0\1"}, "query and answer in turn"),
        ({"roles.bin": b"\1\3"}, "query and answer in turn"),
        ({"convs.bin": u32(1, 1)}, "query and answer in turn"),
        ({"convs.bin": u32(3)}, "convs.bin sums to"),
        ({"marks.bin": b"\0"}, "1 marks for 5 tokens"),
        ({"convs.bin": None}, "no convs.bin"),
    ],
)
def test_malformed_conversation_blocks_are_refused(change: dict[str, bytes | None], message: str) -> None:
    members = {**encode_block(conversation_block([conversation([2, 3])], U16)), **change}
    with pytest.raises(DataError, match=message):
        decode_conversation_block({name: data for name, data in members.items() if data is not None}, U16)


def test_a_system_text_in_the_middle_is_refused() -> None:
    wrong = ConversationTokens([np.array([1])] * 5, [1, 2, 0, 1, 2])
    with pytest.raises(DataError, match="query and answer in turn"):
        decode_conversation_block(encode_block(conversation_block([wrong], U16)), U16)


@pytest.mark.parametrize("dtype", [U16, U32])
def test_shard_round_trip(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    documents = [np.arange(1 + i % 7) + i for i in range(23)]
    path = write_shard(tmp_path, "text", dtype, documents, block_documents=5)
    blocks = read_all(path)
    assert [block.num_documents for block in blocks] == [5, 5, 5, 5, 3]
    found = [block.document(i) for block in blocks for i in range(block.num_documents)]
    assert all(np.array_equal(a, b) for a, b in zip(found, documents, strict=True))
    assert all(block.tokens.dtype == dtype for block in blocks)
    index = ShardIndex.read(path.with_suffix(".idx"))
    assert index.document_tokens.tolist() == [len(document) for document in documents]
    assert index.interactions is None


def test_conversation_shard_and_its_index(tmp_path: Path) -> None:
    conversations = [
        conversation([3, 4, 5, 6], system=2),
        conversation([7, 8], marked=True),
        conversation([1, 1]),
    ]
    path = write_shard(tmp_path, "conversations", U32, conversations, block_documents=2)
    found = [block.document(i) for block in read_all(path) for i in range(block.num_documents)]
    for left, right in zip(found, conversations, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(left.segments, right.segments, strict=True))
    index = ShardIndex.read(path.with_suffix(".idx"))
    assert index.interactions is not None
    assert index.interactions.tolist() == [2, 1, 1]
    assert index.system_tokens is not None
    assert index.system_tokens.tolist() == [2, 0, 0]
    assert index.query_tokens is not None
    assert index.query_tokens.tolist() == [3, 5, 7, 1]
    assert index.answer_tokens is not None
    assert index.answer_tokens.tolist() == [4, 6, 8, 1]
    assert index.document_tokens.tolist() == [20, 15, 2]


def test_blocks_are_bounded_in_bytes(tmp_path: Path) -> None:
    documents = [np.zeros(n, np.int64) for n in (30, 30, 30, 200, 1)]
    blocks = read_all(write_shard(tmp_path, "text", U16, documents, block_bytes=150))
    assert [block.num_documents for block in blocks] == [2, 1, 1, 1]  # a longer document has its own block


def test_shard_info_counts(tmp_path: Path) -> None:
    path = tmp_path / "val" / "rxt-val-000003.tar"
    path.parent.mkdir()
    writer = ShardWriter(path, "conversations", U16, 3)
    writer.add(conversation([3, 4, 5, 6], system=2))
    writer.add(conversation([7, 8]))
    info = writer.close()
    assert (info.name, info.split, info.bytes) == ("rxt-val-000003.tar", "val", path.stat().st_size)
    assert (info.blocks, info.documents, info.conversations, info.interactions) == (1, 2, 2, 3)
    assert (info.tokens, info.max_tokens) == (35, 15)
    assert info.path_in(tmp_path) == path
    assert info.index_path_in(tmp_path).is_file()


def test_stock_webdataset_reads_one_sample_a_block(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "text", U16, [np.arange(9)] * 5, block_documents=2, number=7)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000007_000000", "000007_000001", "000007_000002"]
    assert decode_text_block(samples[0], U16).num_documents == 2
    path = write_shard(tmp_path, "conversations", U16, [conversation([2, 2], marked=True)], number=8)
    (sample,) = webdataset.WebDataset(str(path), shardshuffle=False)
    names = {name for name in sample if not name.startswith("__")}
    assert names == {"tokens.bin", "turns.bin", "roles.bin", "convs.bin", "marks.bin"}


def test_tar_members_are_plain_and_reproducible(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "text", U16, [np.arange(9)])
    with tarfile.open(path) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
            assert member.pax_headers == {}
    again = write_shard(tmp_path, "text", U16, [np.arange(9)])
    assert again.read_bytes() == path.read_bytes()


def test_nothing_has_its_final_name_before_close(tmp_path: Path) -> None:
    path = tmp_path / "rxt-train-000000.tar"
    writer = ShardWriter(path, "text", U16, 0)
    writer.add(np.arange(3))
    assert not path.exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_inside_the_writer_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        ShardWriter(tmp_path / "rxt-train-000000.tar", "text", U16, 0),
    ):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one document"):
        ShardWriter(tmp_path / "rxt-train-000000.tar", "text", U16, 0).close()
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_a_memory_map_are_views(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "text", U16, [np.arange(9)])
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    block = read_block(data, ShardIndex.read(path.with_suffix(".idx")), 0)
    assert np.array_equal(block.tokens, np.arange(9))
    assert not block.tokens.flags.owndata
    assert not block.tokens.flags.writeable


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_bit_flip_in_a_block_is_found(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int
) -> None:
    path = write_shard(tmp_path_factory.mktemp("flip"), "text", U16, [np.arange(50)] * 3, block_documents=2)
    index = ShardIndex.read(path.with_suffix(".idx"))
    data = bytearray(path.read_bytes())
    end = int(index.blocks["offset"][-1] + index.blocks["bytes"][-1])
    data[int(position * end)] ^= 1 << bit
    damaged = int(np.searchsorted(index.blocks["offset"], int(position * end), side="right")) - 1
    with pytest.raises(DataError, match=f"block {damaged}: crc32"):
        read_block(data, index, damaged)


def test_a_cut_shard_names_the_block(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "text", U16, [np.arange(50)] * 3, block_documents=1)
    index = ShardIndex.read(path.with_suffix(".idx"))
    data = path.read_bytes()[: int(index.blocks["offset"][2]) + 10]
    read_block(data, index, 1)
    with pytest.raises(DataError, match="block 2 ends at byte"):
        read_block(data, index, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("000000_000000.tokens.pyd", "not allowed"),
        ("../000000_000000.tokens.bin", "not allowed"),
        ("a/000000_000000.tokens.bin", "not allowed"),
        ("/etc/000000_000000.bin", "not allowed"),
        ("000000_000001.tokens.bin", "does not belong"),
        ("000000_000000.lens.bin", "does not belong"),
    ],
)
def test_members_with_other_names_are_refused(name: str, message: str) -> None:
    data = tar_of("000000_000000.lens.bin", name)
    with pytest.raises(DataError, match=message):
        read_block(data, forged_index(data), 0)


def tar_of(*names: str) -> bytes:
    """A block with a member of eight bytes for every name."""
    block = b""
    for name in names:
        member = tarfile.TarInfo(name)
        member.size = 8
        block += member.tobuf(tarfile.USTAR_FORMAT) + bytes(512)
    return block


def forged_index(data: bytes) -> ShardIndex:
    """An index with a correct crc32 for hostile bytes, so that the parser behind it is reached."""
    blocks = np.array([(0, len(data), 1, 2, zlib.crc32(data))], BLOCK_DTYPE)
    return ShardIndex("text", U16, blocks, np.array([2], np.uint32))


def test_links_are_refused() -> None:
    member = tarfile.TarInfo("000000_000000.tokens.bin")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    data = member.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match="plain file"):
        read_block(data, forged_index(data), 0)


def test_a_member_that_claims_more_than_its_block_is_refused() -> None:
    member = tarfile.TarInfo("000000_000000.tokens.bin")
    member.size = 1 << 32
    data = member.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match="larger than its block"):
        read_block(data, forged_index(data), 0)


def test_a_header_with_a_wrong_checksum_is_refused() -> None:
    data = bytearray(tar_of("000000_000000.lens.bin"))
    data[5] ^= 1
    with pytest.raises(DataError, match="checksum"):
        read_block(data, forged_index(bytes(data)), 0)
