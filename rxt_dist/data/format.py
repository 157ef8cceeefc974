"""Shards: tar files of blocks, each with a binary index, read back by byte span.

A block is one group of tar members (``tokens.bin`` and small arrays of lengths) that holds up to 256
documents, because the cost of a tar is per member. Any webdataset reader can read the shards; ours goes
through the index, which has the position and crc32 of every block and the length of every document, so
that the order of training can be planned without reading a token.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import (
    MAX_MARK,
    ROLE_ANSWER,
    ROLE_QUERY,
    ROLE_SYSTEM,
    Block,
    Buffer,
    ConversationBlock,
    ConversationTokens,
    IntArray,
    TextBlock,
    conversation_block,
    decode_block,
    decode_conversation_block,
    decode_text_block,
    document_lengths,
    encode_block,
    parse_members,
    text_block,
    token_dtype,
)
from rxt_dist.data.cutter import BLOCK_BYTES, BLOCK_DOCUMENTS, BlockCutter
from rxt_dist.data.index import BLOCK_DTYPE, ShardIndex
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
    "conversation_block",
    "decode_conversation_block",
    "decode_text_block",
    "encode_block",
    "read_block",
    "text_block",
    "token_dtype",
]


class ShardWriter:
    """Writes one shard and its index; nothing has the final name before :meth:`close`.

    Either whole documents are added, which are grouped into blocks here, or finished blocks. Use as a
    context manager to remove the temporary file on an exception.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        dtype: np.dtype[Any],
        shard_number: int,
        block_documents: int = BLOCK_DOCUMENTS,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """``path`` is ``<dataset>/<split>/rxt-<split>-NNNNNN.tar``; its folder must exist."""
        from webdataset import TarWriter  # imports torch: readers should not pay for it

        self.path, self.kind, self.dtype = path, kind, dtype
        self._shard_number = shard_number
        self._cutter = BlockCutter(block_documents, block_bytes)
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")
        # An integer mtime: the default is a float, which makes every member a larger PAX one and the file
        # impossible to rebuild.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._spans: list[tuple[int, int]] = []
        self._columns: list[dict[str, npt.NDArray[Any]]] = []

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
        if isinstance(document, ConversationTokens):
            added: Block = conversation_block([document], self.dtype)
        else:
            added = text_block([document], self.dtype)
        for block in self._cutter.add(added):
            self.write_block(block)

    def write_block(self, block: Block) -> None:
        """Append a finished block."""
        key = f"{self._shard_number:06d}_{len(self._spans):06d}"
        start = self.bytes_written
        self._tar.write({"__key__": key, **encode_block(block)})
        self._spans.append((start, self.bytes_written - start))
        self._columns.append(_index_columns(block))

    def close(self) -> ShardInfo:
        """Finish the tar, write the index beside it, give both their final names.

        Raises:
            DataError: nothing was added.
        """
        for block in self._cutter.finish():
            self.write_block(block)
        if not self._spans:
            self.abort()
            raise DataError(f"{self.path}: a shard needs at least one document")
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with self._temporary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            crcs = [_crc32(data, offset, size) for offset, size in self._spans]
            sha256, size = hashlib.sha256(data).hexdigest(), len(data)
        index = self._index(crcs)
        idx_sha256 = index.write(self.path.with_suffix(".idx")).sha256
        self._temporary.replace(self.path)
        fsync_folder(self.path.parent)
        return self._info(index, size, sha256, idx_sha256)

    def _index(self, crcs: list[int]) -> ShardIndex:
        lengths = [columns["document_tokens"] for columns in self._columns]
        rows = [
            (offset, size, len(tokens), int(tokens.sum(dtype=np.int64)), crc)
            for (offset, size), tokens, crc in zip(self._spans, lengths, crcs, strict=True)
        ]
        columns = {
            name: np.concatenate([part[name] for part in self._columns]).astype(np.uint32)
            for name in self._columns[0]
        }
        return ShardIndex(self.kind, self.dtype, np.array(rows, BLOCK_DTYPE), **columns)

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


def _index_columns(block: Block) -> dict[str, npt.NDArray[Any]]:
    """What the index says of the documents of a block."""
    columns: dict[str, npt.NDArray[Any]] = {"document_tokens": document_lengths(block)}
    if isinstance(block, ConversationBlock):
        lengths, first = np.diff(block.segment_starts), block.conversation_segments[:-1]
        has_system = block.roles[first] == ROLE_SYSTEM
        columns["interactions"] = (np.diff(block.conversation_segments) - has_system) // 2
        columns["system_tokens"] = np.where(has_system, lengths[first], 0)
        columns["query_tokens"] = lengths[block.roles == ROLE_QUERY]
        columns["answer_tokens"] = lengths[block.roles == ROLE_ANSWER]
    return columns


def _crc32(data: Buffer, offset: int, size: int) -> int:
    with memoryview(data) as view, view[offset : offset + size] as span:
        return zlib.crc32(span)


def read_block(shard: Buffer, index: ShardIndex, block: int, *, check_crc: bool = True) -> Block:
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
        decoded = decode_block(members, index.kind, index.dtype)
    except DataError as error:
        raise DataError(f"block {block}: {error}") from error
    if decoded.num_documents != int(row["documents"]) or len(decoded.tokens) != int(row["tokens"]):
        raise DataError(f"block {block}: its counts do not match the index")
    return decoded
