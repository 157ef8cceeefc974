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
from rxt_dist.data.manifest import Kind
from rxt_dist.errors import DataError

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
_WIDTHS = (0, 1, 2, 4)  # bytes of a length; 0: all of them are 0
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

    def write(self, path: Path) -> None:
        """Write atomically (temporary file, fsync, rename)."""
        blocks = np.ascontiguousarray(self.blocks, BLOCK_DTYPE)
        entries: list[tuple[str, int, int]] = [("blocks", len(blocks), BLOCK_DTYPE.itemsize)]
        content = [blocks.tobytes()]
        for name in _columns(self.kind, _VERSION):
            values = getattr(self, name)
            width = _width(values)
            entries.append((name, len(values), width))
            if width:
                content.append(values.astype(f"<u{width}").tobytes())
        header = {"kind": self.kind, "dtype": self.dtype.name, "arrays": entries}
        text = json.dumps(header, separators=(",", ":")).encode()
        data = b"".join([_PREFIX.pack(_MAGIC, _VERSION, len(text)), text, *content])
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.write(struct.pack("<I", zlib.crc32(data)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path | str, sha256: str | None = None) -> ShardIndex:
        """Read and check an index; ``sha256``: what the file must hash to.

        Raises:
            DataError: missing, damaged, of another version, or inconsistent. The size of the file is compared
                with what its header implies before the arrays are read.
        """
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(_FIRST_READ)
                if size > len(data):
                    _parse_header(data, size)
                    data += file.read(size - len(data))
        except OSError as error:
            raise DataError(f"{path}: cannot read the index: {error.strerror}") from error
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        return cls.parse(data, str(path), sha256)

    @classmethod
    def parse(cls, data: bytes, name: str, sha256: str | None = None) -> ShardIndex:
        """An index from the content of its file, which messages call ``name``; see :meth:`read`."""
        try:
            header = _parse_header(data, len(data))
            if struct.unpack("<I", data[-4:])[0] != zlib.crc32(memoryview(data)[:-4]):
                raise DataError("its crc32 does not match its content")
            if sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise DataError("its sha256 is not that of the manifest")
            index = _from_columns(header, _read_columns(data, header))
            _check_sums(index)
        except DataError as error:
            raise DataError(f"{name} is damaged: {error}") from error
        return index


def join_indices(indices: Sequence[ShardIndex], kind: Kind, dtype: np.dtype[Any]) -> ShardIndex:
    """The documents of all ``indices`` one after the other; offsets of blocks stay those in their shards."""

    def joined(name: str) -> UInt32Array:
        return np.concatenate([np.zeros(0, np.uint32), *(getattr(index, name) for index in indices)])

    # As bytes, because joining records compares their types one by one.
    octets = [index.blocks.view(np.uint8) for index in indices]
    blocks = np.concatenate([np.zeros(0, np.uint8), *octets]).view(BLOCK_DTYPE)
    columns = {} if kind == "text" else {name: joined(name) for name in _CONVERSATION_COLUMNS}
    return ShardIndex(kind, dtype, blocks, joined("document_tokens"), **columns)


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
        if width not in _WIDTHS or (count and not width and name != "system_tokens"):
            raise DataError(f"{name} with {width} bytes a length in the header")
    if header.kind == "conversations" and columns["system_tokens"][0] != columns["interactions"][0]:
        raise DataError("arrays of conversations differ in length")


def _read_columns(data: bytes, header: _Header) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "blocks": np.frombuffer(data, BLOCK_DTYPE, header.blocks, header.start)
    }
    position = header.start + arrays["blocks"].nbytes
    for name, (count, width) in header.columns.items():
        if width:
            stored = np.frombuffer(data, f"<u{width}", count, position)
            arrays[name] = stored.astype(np.uint32, copy=False)
            position += stored.nbytes
        else:
            arrays[name] = np.zeros(count, np.uint32)
    return arrays


def _from_columns(header: _Header, arrays: dict[str, npt.NDArray[Any]]) -> ShardIndex:
    if header.kind == "conversations":
        interactions, query, answer = (arrays[n] for n in ("interactions", "query_tokens", "answer_tokens"))
        if not int(interactions.sum(dtype=np.int64)) == len(query) == len(answer):
            raise DataError("interactions do not add up")
        ends = starts_of(query.astype(np.int64) + answer)[starts_of(interactions)]
        tokens = (np.diff(ends) + arrays["system_tokens"]).astype(np.uint32)
        if not np.array_equal(arrays.setdefault("document_tokens", tokens), tokens):
            raise DataError("tokens of the segments do not add up")
    return ShardIndex(kind=header.kind, dtype=header.dtype, **arrays)


def _check_sums(index: ShardIndex) -> None:
    """The blocks agree with the lengths of the documents."""
    if int(index.blocks["documents"].sum(dtype=np.int64)) != len(index.document_tokens):
        raise DataError("documents of the blocks do not add up")
    if int(index.blocks["tokens"].sum(dtype=np.int64)) != int(index.document_tokens.sum(dtype=np.int64)):
        raise DataError("tokens of the blocks do not add up")
