"""Shards: tar files of blocks, each with a binary index, read back by byte span.

A block is one group of tar members (``tokens.bin`` and small arrays of lengths) that holds about 64
documents, because the cost of a tar is per member. Any webdataset reader can read the shards; ours goes
through the index, which has the position and crc32 of every block and the length of every document, so
that the order of training can be planned without reading a token.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import (
    LENGTH_DTYPE,
    MAX_MARK,
    ROLE_ANSWER,
    ROLE_QUERY,
    ROLE_SYSTEM,
    Buffer,
    ConversationBlock,
    ConversationTokens,
    IntArray,
    TextBlock,
    decode_conversation_block,
    decode_text_block,
    encode_conversation_block,
    encode_text_block,
    parse_members,
    token_dtype,
)
from rxt_dist.data.manifest import Kind, ShardInfo, Split
from rxt_dist.errors import DataError
from rxt_dist.files import fsync_folder

__all__ = [
    "BLOCK_DTYPE",
    "MAX_MARK",
    "ROLE_ANSWER",
    "ROLE_QUERY",
    "ROLE_SYSTEM",
    "ConversationBlock",
    "ConversationTokens",
    "Kind",
    "ShardIndex",
    "ShardWriter",
    "TextBlock",
    "decode_conversation_block",
    "decode_text_block",
    "encode_conversation_block",
    "encode_text_block",
    "read_block",
    "token_dtype",
]

BLOCK_DTYPE = np.dtype(
    [("offset", "<u8"), ("bytes", "<u8"), ("documents", "<u4"), ("tokens", "<u8"), ("crc32", "<u4")]
)
_INDEX_MAGIC = b"RXTINDEX"
_INDEX_VERSION = 1
_INDEX_PREFIX = struct.Struct("<8sII")  # magic, version, bytes of the JSON header
_TEXT_ARRAYS = {"blocks": BLOCK_DTYPE, "document_tokens": LENGTH_DTYPE}
_CONVERSATION_ARRAYS = {
    **_TEXT_ARRAYS,
    "interactions": LENGTH_DTYPE,
    "system_tokens": LENGTH_DTYPE,
    "query_tokens": LENGTH_DTYPE,
    "answer_tokens": LENGTH_DTYPE,
}


@dataclass(frozen=True)
class ShardIndex:
    """What a reader knows of one shard without opening it.

    D documents (or conversations), I interactions of the whole shard, K blocks.
    """

    kind: Kind
    dtype: np.dtype[Any]
    blocks: npt.NDArray[Any]
    """[K] of BLOCK_DTYPE: byte span in the tar (member headers included), documents, tokens, crc32 of the
    span."""
    document_tokens: npt.NDArray[np.uint32]
    """[D] tokens of every document or conversation."""
    interactions: npt.NDArray[np.uint32] | None = None
    """[D] interactions of every conversation; None for text."""
    system_tokens: npt.NDArray[np.uint32] | None = None
    """[D], 0 = no system text; None for text."""
    query_tokens: npt.NDArray[np.uint32] | None = None
    """[I], special tokens included; None for text."""
    answer_tokens: npt.NDArray[np.uint32] | None = None
    """[I], special tokens included; None for text."""

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        names = _TEXT_ARRAYS if self.kind == "text" else _CONVERSATION_ARRAYS
        return {name: np.ascontiguousarray(getattr(self, name), dtype) for name, dtype in names.items()}

    def write(self, path: Path) -> None:
        """Write atomically (temporary file, fsync, rename)."""
        arrays = self._arrays()
        header = {
            "kind": self.kind,
            "dtype": self.dtype.name,
            "arrays": [[name, len(array)] for name, array in arrays.items()],
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        parts = [_INDEX_PREFIX.pack(_INDEX_MAGIC, _INDEX_VERSION, len(text)), text]
        data = b"".join([*parts, *(array.tobytes() for array in arrays.values())])
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data + struct.pack("<I", zlib.crc32(data)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Read and check an index.

        Raises:
            DataError: missing, damaged, of another version, or inconsistent.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the index: {error.strerror}") from error
        try:
            index = cls._parse(data)
            index._check()
        except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        return index

    @classmethod
    def _parse(cls, data: bytes) -> ShardIndex:
        if len(data) < _INDEX_PREFIX.size + 4 or data[:8] != _INDEX_MAGIC:
            raise DataError("not a shard index")
        _, version, header_bytes = _INDEX_PREFIX.unpack_from(data)
        if version != _INDEX_VERSION:
            raise DataError(f"index version {version}; this version of rxt-dist reads {_INDEX_VERSION}")
        if struct.unpack("<I", data[-4:])[0] != zlib.crc32(memoryview(data)[:-4]):
            raise DataError("its crc32 does not match its content")
        position = _INDEX_PREFIX.size + header_bytes
        header = json.loads(data[_INDEX_PREFIX.size : position])
        kind = header["kind"]
        dtypes = {"text": _TEXT_ARRAYS, "conversations": _CONVERSATION_ARRAYS}[kind]
        if [name for name, _ in header["arrays"]] != list(dtypes) or header["dtype"] not in (
            "uint16",
            "uint32",
        ):
            raise DataError("unknown arrays or token type in the header")
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, count in header["arrays"]:
            arrays[name] = np.frombuffer(data, dtypes[name], count, position)
            position += arrays[name].nbytes
        if position != len(data) - 4:
            raise DataError("wrong size")
        return cls(kind=kind, dtype=np.dtype(header["dtype"]).newbyteorder("<"), **arrays)

    def _check(self) -> None:
        """The arrays agree with each other."""
        if int(self.blocks["documents"].sum(dtype=np.int64)) != len(self.document_tokens):
            raise DataError("documents of the blocks do not add up")
        if int(self.blocks["tokens"].sum(dtype=np.int64)) != int(self.document_tokens.sum(dtype=np.int64)):
            raise DataError("tokens of the blocks do not add up")
        if self.kind == "text":
            return
        interactions, system, query, answer = (
            cast(npt.NDArray[np.uint32], getattr(self, name)) for name in list(_CONVERSATION_ARRAYS)[2:]
        )
        if not len(interactions) == len(system) == len(self.document_tokens):
            raise DataError("arrays of conversations differ in length")
        if not int(interactions.sum(dtype=np.int64)) == len(query) == len(answer):
            raise DataError("interactions do not add up")
        if sum(int(a.sum(dtype=np.int64)) for a in (system, query, answer)) != int(
            self.document_tokens.sum(dtype=np.int64)
        ):
            raise DataError("tokens of the segments do not add up")


class ShardWriter:
    """Writes one shard and its index; nothing has the final name before :meth:`close`.

    Use as a context manager to remove the temporary file on an exception.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        dtype: np.dtype[Any],
        shard_number: int,
        block_documents: int = 64,
        block_bytes: int = 262144,
    ) -> None:
        """``path`` is ``<dataset>/<split>/rxt-<split>-NNNNNN.tar``; its folder must exist."""
        from webdataset import TarWriter  # imports torch: readers should not pay for it

        self.path, self.kind, self.dtype = path, kind, dtype
        self._shard_number, self._block_documents, self._block_bytes = (
            shard_number,
            block_documents,
            block_bytes,
        )
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")
        # An integer mtime: the default is a float, which makes every member a larger PAX one and the file
        # impossible to rebuild.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._pending: list[Any] = []
        self._pending_bytes = 0
        self._blocks: list[tuple[int, int, int, int]] = []
        self._columns = {name: array("I") for name in list(_CONVERSATION_ARRAYS)[1:]}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()

    @property
    def bytes_written(self) -> int:
        """Bytes of the tar so far, without the block being filled."""
        return int(self._tar.tarstream.offset)

    def add(self, document: IntArray | ConversationTokens) -> None:
        """Append a document (array of ids) or a conversation, according to the kind of the shard."""
        tokens = document.num_tokens if isinstance(document, ConversationTokens) else len(document)
        size = tokens * self.dtype.itemsize
        if self._pending and self._pending_bytes + size > self._block_bytes:
            self._flush()
        self._pending.append(document)
        self._pending_bytes += size
        self._columns["document_tokens"].append(tokens)
        if isinstance(document, ConversationTokens):
            roles = document.roles
            lengths = [len(segment) for segment in document.segments]
            has_system = roles[0] == ROLE_SYSTEM
            self._columns["system_tokens"].append(lengths[0] if has_system else 0)
            self._columns["interactions"].append(len(lengths) // 2)
            self._columns["query_tokens"].extend(lengths[int(has_system) :: 2])
            self._columns["answer_tokens"].extend(lengths[int(has_system) + 1 :: 2])
        if len(self._pending) >= self._block_documents:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        encode = encode_text_block if self.kind == "text" else encode_conversation_block
        members = encode(self._pending, self.dtype)
        key = f"{self._shard_number:06d}_{len(self._blocks):06d}"
        start = self.bytes_written
        self._tar.write({"__key__": key, **members})
        tokens = len(members["tokens.bin"]) // self.dtype.itemsize
        self._blocks.append((start, self.bytes_written - start, len(self._pending), tokens))
        self._pending, self._pending_bytes = [], 0

    def close(self) -> ShardInfo:
        """Finish the tar, write the index beside it, give both their final names.

        Raises:
            DataError: nothing was added.
        """
        self._flush()
        if not self._blocks:
            self.abort()
            raise DataError(f"{self.path}: a shard needs at least one document")
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with self._temporary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            rows = [(o, n, d, t, _crc32(data, o, n)) for o, n, d, t in self._blocks]
            sha256, size = hashlib.sha256(data).hexdigest(), len(data)
        blocks = np.array(rows, BLOCK_DTYPE)
        names = list(_TEXT_ARRAYS if self.kind == "text" else _CONVERSATION_ARRAYS)[1:]
        columns: dict[str, Any] = {name: np.array(self._columns[name], LENGTH_DTYPE) for name in names}
        index = ShardIndex(self.kind, self.dtype, blocks, **columns)
        index_path = self.path.with_suffix(".idx")
        index.write(index_path)
        self._temporary.replace(self.path)
        fsync_folder(self.path.parent)
        return self._info(index, size, sha256, hashlib.sha256(index_path.read_bytes()).hexdigest())

    def _info(self, index: ShardIndex, size: int, sha256: str, idx_sha256: str) -> ShardInfo:
        units = index.document_tokens.astype(np.int64)
        documents, interactions = len(units), 0
        if index.query_tokens is not None and index.answer_tokens is not None:
            units = index.query_tokens.astype(np.int64) + index.answer_tokens
            interactions = len(units)
        return ShardInfo(
            name=self.path.name,
            split=cast(Split, self.path.parent.name),
            bytes=size,
            sha256=sha256,
            idx_sha256=idx_sha256,
            blocks=len(index.blocks),
            documents=documents,
            conversations=0 if self.kind == "text" else documents,
            interactions=interactions,
            tokens=int(index.document_tokens.sum(dtype=np.int64)),
            max_tokens=int(units.max()),
        )

    def abort(self) -> None:
        """Remove what was written; does nothing after :meth:`close`."""
        if self._file.closed:
            return
        with self._file:
            self._tar.close()  # a tar stream that is left open complains when it is collected
        self._temporary.unlink(missing_ok=True)


def _crc32(data: Buffer, offset: int, size: int) -> int:
    with memoryview(data) as view, view[offset : offset + size] as span:
        return zlib.crc32(span)


def read_block(
    shard: Buffer, index: ShardIndex, block: int, *, check_crc: bool = True
) -> TextBlock | ConversationBlock:
    """Decode one block of a shard given as its bytes or a memory map.

    The arrays of the result are views of ``shard``; ``check_crc=False`` is for a block already checked.

    Raises:
        DataError: the block is outside of the file, its crc32 is wrong, or its content is malformed.
    """
    row = index.blocks[block]
    offset, size = int(row["offset"]), int(row["bytes"])
    view = memoryview(shard)
    if offset + size > len(view):
        raise DataError(
            f"block {block} ends at byte {offset + size} but the shard has {len(view)}: it was cut"
        )
    span = view[offset : offset + size]
    if check_crc and zlib.crc32(span) != int(row["crc32"]):
        raise DataError(f"block {block}: crc32 does not match the index")
    try:
        members = parse_members(span)
        decode = decode_text_block if index.kind == "text" else decode_conversation_block
        decoded = decode(members, index.dtype)
    except DataError as error:
        raise DataError(f"block {block}: {error}") from error
    if decoded.num_documents != int(row["documents"]) or len(decoded.tokens) != int(row["tokens"]):
        raise DataError(f"block {block}: its counts do not match the index")
    return decoded
