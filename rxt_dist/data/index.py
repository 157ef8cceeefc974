"""The index of a shard: where its blocks are and how long its documents are, without reading a token.

Lengths are stored in as few bytes as the largest of them needs, because there is one for each query and each
answer: for short conversations four bytes each would be a quarter of the dataset.

Shape legend: D documents (or conversations), I interactions, K blocks, all of the shard or of several.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import starts_of
from rxt_dist.data.manifest import IndexInfo, Kind, ShardInfo, Split, split_index_name
from rxt_dist.errors import DataError
from rxt_dist.files import fsync_folder

UInt32Array = npt.NDArray[np.uint32]

BLOCK_DTYPE = np.dtype(
    [("offset", "<u8"), ("bytes", "<u8"), ("documents", "<u4"), ("tokens", "<u8"), ("crc32", "<u4")]
)
_MAGIC = b"RXTINDEX"
_VERSION = 2
_VERSION_OF_FULL_WIDTH = 1
"""Had four bytes for every length, and the tokens of conversations besides those of their segments."""
_PREFIX = struct.Struct("<8sII")  # magic, version, bytes of the JSON header
_MAX_HEADER_BYTES = 4096
_FIRST_READ = 1 << 16
_STORED = {width: np.dtype(f"<u{width}") for width in (1, 2, 4)}
"""Type of a length by its bytes; 0 bytes: all of them are 0."""
_NOTHING = np.zeros(0, dtype=np.uint32)
_CONVERSATION_COLUMNS = ("interactions", "system_tokens", "query_tokens", "answer_tokens")


@dataclass(frozen=True)
class ShardIndex:
    """What a reader knows of a shard, or of several one after the other, without opening it."""

    kind: Kind
    dtype: np.dtype[Any]
    blocks: npt.NDArray[Any]
    """[K] of BLOCK_DTYPE: byte span in the tar (member headers included), documents, tokens, crc32 of the
    span."""
    document_tokens: UInt32Array
    """[D] tokens of every document or conversation."""
    interactions: UInt32Array | None = None
    """[D] interactions of every conversation; None for text."""
    system_tokens: UInt32Array | None = None
    """[D], 0 = no system text; None for text."""
    query_tokens: UInt32Array | None = None
    """[I], special tokens included; None for text."""
    answer_tokens: UInt32Array | None = None
    """[I], special tokens included; None for text."""

    def write(self, path: Path) -> IndexInfo:
        """Write atomically (temporary file, fsync, rename), and return what identifies the file."""
        blocks = np.ascontiguousarray(self.blocks, BLOCK_DTYPE)
        entries: list[tuple[str, int, int]] = [("blocks", len(blocks), BLOCK_DTYPE.itemsize)]
        content = [blocks.tobytes()]
        for name in _columns(self.kind, _VERSION):
            values = getattr(self, name)
            width = _width(values)
            entries.append((name, len(values), width))
            if width:
                content.append(values.astype(_STORED[width]).tobytes())
        header = {"kind": self.kind, "dtype": self.dtype.name, "arrays": entries}
        text = json.dumps(header, separators=(",", ":")).encode()
        data = b"".join([_PREFIX.pack(_MAGIC, _VERSION, len(text)), text, *content])
        checksum = struct.pack("<I", zlib.crc32(data))
        digest = hashlib.sha256(data)
        digest.update(checksum)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.write(checksum)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return IndexInfo(bytes=len(data) + len(checksum), sha256=digest.hexdigest())

    @classmethod
    def read(cls, path: Path | str) -> ShardIndex:
        """Read and check an index.

        Raises:
            DataError: missing, damaged, of another version, or inconsistent. The size of the file is compared
                with what its header implies before the arrays are read.
        """
        file = IndexFile.read(path)
        return join_indices([file], file.header.kind, file.header.dtype)


class IndexFile:
    """The content of an index that is whole; whether its arrays agree is checked by :func:`join_indices`."""

    def __init__(self, data: bytes, name: str, sha256: str | None = None) -> None:
        """``data``: content of the file, which messages call ``name`` and which must hash to ``sha256``.

        Raises:
            DataError: it is damaged, or of another version.
        """
        self.name = name
        try:
            self.header = _parse_header(data, len(data))
            if sha256 is None:
                if struct.unpack("<I", data[-4:])[0] != zlib.crc32(memoryview(data)[:-4]):
                    raise DataError("its crc32 does not match its content")
            elif sha256 != hashlib.sha256(data).hexdigest():
                raise DataError("its sha256 is not that of the manifest")
        except DataError as error:
            raise DataError(f"{name} is damaged: {error}") from error
        self._data = data

    @classmethod
    def read(cls, path: Path | str, sha256: str | None = None) -> IndexFile:
        """The index at ``path``. Raises DataError as the constructor does, and if it is missing."""
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(_FIRST_READ)
                if size > len(data):
                    _parse_header(data, size)
                while len(data) < size and (more := file.read(size - len(data))):  # 2 GiB at most at once
                    data += more
        except OSError as error:
            raise DataError(f"{path}: cannot read the index: {error.strerror}") from error
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        return cls(data, str(path), sha256)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Blocks, documents and interactions."""
        columns = self.header.columns
        if self.header.kind == "text":
            return self.header.blocks, columns["document_tokens"][0], 0
        return self.header.blocks, columns["interactions"][0], columns["query_tokens"][0]

    def blocks(self) -> npt.NDArray[np.uint8]:
        """The rows of the blocks, as bytes."""
        size = self.header.blocks * BLOCK_DTYPE.itemsize
        return np.frombuffer(self._data, np.uint8, size, self.header.start)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of lengths, in the types they are stored in."""
        position = self.header.start + self.header.blocks * BLOCK_DTYPE.itemsize
        arrays = {}
        for name, (count, width) in self.header.columns.items():
            if width:
                arrays[name] = np.frombuffer(self._data, _STORED[width], count, position)
                position += count * width
            else:
                arrays[name] = np.zeros(count, np.uint8)
        return arrays


def join_indices(files: Sequence[IndexFile], kind: Kind, dtype: np.dtype[Any]) -> ShardIndex:
    """The documents of all ``files`` one after the other; offsets of blocks stay those in their shards.

    Raises:
        DataError: one of them contradicts itself, or is of another kind or token type.
    """
    for file in files:
        if file.header.kind != kind or file.header.dtype != dtype:
            found = f"{file.header.kind} in {file.header.dtype.name}"
            raise DataError(f"{file.name} is an index of {found}, expected {kind} in {dtype.name}")
    parts = [file.columns() for file in files]

    def joined(name: str) -> UInt32Array:
        return np.concatenate([_NOTHING, *(part[name] for part in parts)], dtype=np.uint32)

    # As bytes, because joining records compares their types one by one.
    blocks = np.concatenate([_NOTHING.view(np.uint8), *(file.blocks() for file in files)]).view(BLOCK_DTYPE)
    names = ("document_tokens",) if kind == "text" else _CONVERSATION_COLUMNS
    columns = {name: joined(name) for name in names}
    try:
        if kind == "conversations":
            columns["document_tokens"] = _conversation_tokens(columns)
            if all("document_tokens" in part for part in parts) and not np.array_equal(
                columns["document_tokens"], joined("document_tokens")
            ):
                raise DataError("tokens of the segments do not add up")
        index = ShardIndex(kind, dtype, blocks, **columns)
        _check_sums(index)
    except DataError as error:
        if len(files) == 1:
            raise DataError(f"{files[0].name} is damaged: {error}") from error
        for file in files:  # to say which
            join_indices([file], kind, dtype)
        raise
    return index


def write_split_indices(folder: Path, shards: Sequence[ShardInfo]) -> dict[Split, IndexInfo]:
    """Write the index of every split of the dataset ``folder`` from those of its finished ``shards``.

    Raises:
        DataError: an index of a shard is missing or damaged.
    """
    written: dict[Split, IndexInfo] = {}
    for split in dict.fromkeys(shard.split for shard in shards):
        files = [
            IndexFile.read(shard.index_path_in(folder), shard.idx_sha256)
            for shard in shards
            if shard.split == split
        ]
        joined = join_indices(files, files[0].header.kind, files[0].header.dtype)
        written[split] = joined.write(folder / split / split_index_name(split))
        fsync_folder(folder / split)
    return written


def _conversation_tokens(columns: dict[str, UInt32Array]) -> UInt32Array:
    """Tokens of every conversation, from those of its segments: [D]."""
    interactions, query, answer = (
        columns[name] for name in ("interactions", "query_tokens", "answer_tokens")
    )
    if not int(interactions.sum(dtype=np.int64)) == len(query) == len(answer):
        raise DataError("interactions do not add up")
    ends = starts_of(query.astype(np.int64) + answer)[starts_of(interactions)]
    return (np.diff(ends) + columns["system_tokens"]).astype(np.uint32)


@dataclass(frozen=True)
class _Header:
    kind: Kind
    dtype: np.dtype[Any]
    start: int
    """Where the arrays begin."""
    blocks: int
    columns: dict[str, tuple[int, int]]
    """Length of every array of lengths and bytes of an entry, in the order of the file."""


def _columns(kind: Kind, version: int) -> tuple[str, ...]:
    """The arrays of lengths that a file has, in their order."""
    if kind == "text":
        return ("document_tokens",)
    whole = ("document_tokens",) if version == _VERSION_OF_FULL_WIDTH else ()
    return (*whole, *_CONVERSATION_COLUMNS)


def _width(values: npt.NDArray[Any]) -> int:
    """Bytes that hold each of ``values``, 0 if all of them are 0."""
    largest = int(values.max(initial=0))
    return 0 if largest == 0 else np.min_scalar_type(largest).itemsize


def _parse_header(data: bytes, size: int) -> _Header:
    """The header of an index of ``size`` bytes that begins with ``data``."""
    if len(data) < _PREFIX.size or data[:8] != _MAGIC:
        raise DataError("not a shard index")
    _, version, header_bytes = _PREFIX.unpack_from(data)
    if version not in (_VERSION, _VERSION_OF_FULL_WIDTH):
        raise DataError(
            f"index version {version}; this version of rxt-dist reads {_VERSION_OF_FULL_WIDTH} and {_VERSION}"
        )
    if header_bytes > _MAX_HEADER_BYTES:
        raise DataError(f"a header of {header_bytes} bytes; it has at most {_MAX_HEADER_BYTES}")
    start = _PREFIX.size + header_bytes
    try:
        content = json.loads(data[_PREFIX.size : start])
        header = _header(content, version, start)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"its header is malformed: {error}") from error
    arrays = sum(count * width for count, width in header.columns.values())
    expected = start + header.blocks * BLOCK_DTYPE.itemsize + arrays + 4
    if size != expected:
        raise DataError(f"it has {size} bytes, its header implies {expected}")
    return header


def _header(content: dict[str, Any], version: int, start: int) -> _Header:
    kind: Kind = content["kind"]
    if kind not in ("text", "conversations") or content["dtype"] not in ("uint16", "uint32"):
        raise DataError("unknown kind or token type in the header")
    entries = [tuple(entry) for entry in content["arrays"]]
    if version == _VERSION_OF_FULL_WIDTH:
        entries = [(name, count, 4) for name, count in entries]
    (first, blocks, _), *rest = entries
    if (first, *(name for name, _, _ in rest)) != ("blocks", *_columns(kind, version)):
        raise DataError("unknown arrays in the header")
    columns = {name: (operator.index(count), operator.index(width)) for name, count, width in rest}
    header = _Header(
        kind, np.dtype(content["dtype"]).newbyteorder("<"), start, operator.index(blocks), columns
    )
    _check_header(header)
    return header


def _check_header(header: _Header) -> None:
    columns = header.columns
    if min(header.blocks, *(count for count, _ in columns.values())) < 0:
        raise DataError("an array of negative length in the header")
    # Only an array whose length another one repeats may take no bytes: nothing is allocated without bytes
    # in the file to show for it.
    for name, (count, width) in columns.items():
        if width not in _STORED and (width or (count and name != "system_tokens")):
            raise DataError(f"{name} with {width} bytes a length in the header")
    if header.kind == "conversations" and columns["system_tokens"][0] != columns["interactions"][0]:
        raise DataError("arrays of conversations differ in length")


def _check_sums(index: ShardIndex) -> None:
    """The blocks agree with the lengths of the documents."""
    if int(index.blocks["documents"].sum(dtype=np.int64)) != len(index.document_tokens):
        raise DataError("documents of the blocks do not add up")
    if int(index.blocks["tokens"].sum(dtype=np.int64)) != int(index.document_tokens.sum(dtype=np.int64)):
        raise DataError("tokens of the blocks do not add up")
