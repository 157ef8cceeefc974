"""Random access to a split of a dataset: token spans of documents and interactions.

Shards are mapped into memory on first use. The first time a block is needed its crc32 is checked, it is
decoded, and its lengths are compared with the index; from then on only the place of its tokens is
remembered, so a read is an address computation and a copy, whatever the order of the reads.

Shape legend: D documents (or conversations), I interactions, K blocks, n spans.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import ROLE_ANSWER, ROLE_QUERY, ROLE_SYSTEM, ConversationBlock, TextBlock
from rxt_dist.data.format import ShardIndex, read_block
from rxt_dist.data.manifest import Kind, ShardInfo, Split, load_manifest
from rxt_dist.errors import DataError

Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]
UInt8Array = npt.NDArray[np.uint8]

_OPEN_SHARDS = 256  # each holds a file descriptor
_UNVERIFIED = -1
_NO_MARKS = -1


@dataclass(frozen=True)
class Interaction:
    """One interaction of a conversation, special tokens included."""

    query: Int64Array
    """[BOS] [Q] ..."""
    answer: Int64Array
    """[A] ... [EOS]"""
    marks: UInt8Array | None
    """One an answer token: d >= 1 says it can only be known from the interaction d interactions earlier.
    None when the block has no marks."""


@dataclass(frozen=True)
class _OpenShard:
    data: mmap.mmap
    tokens: npt.NDArray[Any]  # the whole tar as an array of the token type
    octets: UInt8Array  # the same bytes


def _starts(counts: npt.NDArray[Any]) -> Int64Array:
    """Exclusive prefix sums with the total at the end: int64 [len + 1]."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, dtype=np.int64, out=starts[1:])
    return starts


class Dataset:
    """One split of a dataset folder.

    Reading is safe from several threads. Damage is reported before any token of the damaged block is
    delivered.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        """Load the manifest and every index of the split; no shard is opened yet.

        Raises:
            DataError: the manifest or an index is missing or damaged, or a shard is missing or has
                another size than the manifest says.
        """
        self.folder = folder
        self.split: Split = split
        self.manifest = load_manifest(folder)
        self._shards = self.manifest.shards_of(split)
        self._indices = [self._load_index(shard) for shard in self._shards]
        for shard in self._shards:
            self._check_size(shard)
        self._join_indices()
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._token_address = np.full(self._block_tokens.shape, _UNVERIFIED, dtype=np.int64)
        self._mark_address = np.full(self._block_tokens.shape, _NO_MARKS, dtype=np.int64)

    @property
    def kind(self) -> Kind:
        """ "text" or "conversations"."""
        return self.manifest.kind

    @property
    def fingerprint(self) -> str:
        """Identity of the dataset's content (both splits)."""
        return self.manifest.fingerprint

    @property
    def num_documents(self) -> int:
        """Documents (text) or conversations of the split; may be 0."""
        return len(self.document_tokens)

    def _load_index(self, shard: ShardInfo) -> ShardIndex:
        path = shard.index_path_in(self.folder)
        index = ShardIndex.read(path)
        found = (index.kind, index.dtype.name, len(index.blocks), len(index.document_tokens))
        expected = (self.manifest.kind, self.manifest.dtype, shard.blocks, shard.documents)
        if found != expected:
            raise DataError(
                f"{path} does not belong to this dataset: it has (kind, token type, blocks, documents) "
                f"{found}, the manifest says {expected}"
            )
        return index

    def _check_size(self, shard: ShardInfo) -> None:
        path = shard.path_in(self.folder)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot open the shard: {error.strerror}") from error
        if size != shard.bytes:
            raise DataError(f"{path} is damaged: it has {size} bytes, the manifest says {shard.bytes}")

    def _join_indices(self) -> None:
        def joined(name: str) -> UInt32Array:
            parts = [getattr(index, name) for index in self._indices]
            present = [part for part in parts if part is not None]
            return np.concatenate(present) if present else np.zeros(0, dtype=np.uint32)

        self.document_tokens = joined("document_tokens")
        """uint32 [D] tokens of every document; of all segments of a conversation."""
        self.interactions = joined("interactions")
        """uint32 [D] interactions of every conversation; [0] for text."""
        self.system_tokens = joined("system_tokens")
        """uint32 [D] tokens of the system segment, 0 = none; [0] for text."""
        self.query_tokens = joined("query_tokens")
        """uint32 [I]; [0] for text."""
        self.answer_tokens = joined("answer_tokens")
        """uint32 [I]; [0] for text."""
        self.interaction_starts = _starts(self.interactions)
        """int64 [D + 1] number of the first interaction of every conversation, ends with I."""
        self._interaction_token_starts = _starts(self.query_tokens.astype(np.int64) + self.answer_tokens)
        self._document_token_starts = _starts(self.document_tokens)
        blocks = [index.blocks for index in self._indices]
        self._block_tokens = np.concatenate([b["tokens"] for b in blocks] or [np.zeros(0, dtype=np.uint64)])
        self._block_documents = _starts(
            np.concatenate([b["documents"] for b in blocks] or [np.zeros(0, dtype=np.uint32)])
        )
        self._shard_blocks = _starts(np.array([len(b) for b in blocks], dtype=np.int64))

    def text_document(self, document: int) -> Int64Array:
        """Tokens of one text document. Raises DataError if its block is damaged."""
        number = np.array([document])
        return self.read_spans(number, np.zeros(1, dtype=np.int64), self.document_tokens[number])

    def system_prompt(self, conversation: int) -> Int64Array:
        """Tokens of the conversation's system segment, empty if it has none."""
        number = np.array([conversation])
        return self.read_spans(number, np.zeros(1, dtype=np.int64), self.system_tokens[number])

    def interaction(self, conversation: int, number: int) -> Interaction:
        """Interaction ``number`` (from 0) of a conversation. Raises DataError if its block is damaged."""
        index = np.array([self.interaction_starts[conversation] + number])
        conversations, offsets = self.locate_interactions(index)
        query, answer = self.query_tokens[index], self.answer_tokens[index]
        marks = self.read_mark_spans(conversations, offsets + query, answer)
        return Interaction(
            query=self.read_spans(conversations, offsets, query),
            answer=self.read_spans(conversations, offsets + query, answer),
            marks=marks,
        )

    def locate_interactions(self, interactions: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Conversation of each interaction (numbered over the split), and the offset of its query in
        that conversation's tokens: two int64 [n]."""
        numbers = np.asarray(interactions, dtype=np.int64)
        conversations = np.searchsorted(self.interaction_starts, numbers, side="right") - 1
        first = self.interaction_starts[conversations]
        offsets = self._interaction_token_starts[numbers] - self._interaction_token_starts[first]
        return conversations, offsets + self.system_tokens[conversations]

    def read_spans(
        self, documents: Int64Array, offsets: npt.NDArray[Any], lengths: npt.NDArray[Any]
    ) -> Int64Array:
        """Token spans, each inside one document: ``offsets`` [n] count tokens from the document's start.

        Returns the spans one after the other: int64 [sum of lengths].

        Raises:
            DataError: a shard cannot be opened or a block is damaged; names the shard file and the block.
        """
        shards, addresses, _ = self._locate(documents, offsets)
        views = {shard: self._open(shard).tokens for shard in np.unique(shards).tolist()}
        parts = [
            views[shard][start : start + length]
            for shard, start, length in zip(
                shards.tolist(), addresses.tolist(), lengths.tolist(), strict=True
            )
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts], dtype=np.int64)

    def read_mark_spans(
        self, documents: Int64Array, offsets: npt.NDArray[Any], lengths: npt.NDArray[Any]
    ) -> UInt8Array | None:
        """The marks of the same spans: uint8 [sum of lengths]; None when no block of them has marks."""
        shards, _, addresses = self._locate(documents, offsets)
        if not (addresses >= 0).any():
            return None
        views = {shard: self._open(shard).octets for shard in np.unique(shards).tolist()}
        parts = [
            views[shard][start : start + length] if start >= 0 else np.zeros(length, dtype=np.uint8)
            for shard, start, length in zip(
                shards.tolist(), addresses.tolist(), lengths.tolist(), strict=True
            )
        ]
        return np.concatenate(parts)

    def _locate(
        self, documents: Int64Array, offsets: npt.NDArray[Any]
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Shard, element of the token view, and byte of the mark (negative: no marks) where spans start."""
        blocks = np.searchsorted(self._block_documents, documents, side="right") - 1
        shards = np.searchsorted(self._shard_blocks, blocks, side="right") - 1
        for block in np.unique(blocks[self._token_address[blocks] == _UNVERIFIED]).tolist():
            self._verify(block)
        first_document = self._block_documents[blocks]
        inside = (
            self._document_token_starts[documents] - self._document_token_starts[first_document] + offsets
        )
        marks = self._mark_address[blocks]
        return shards, self._token_address[blocks] + inside, np.where(marks >= 0, marks + inside, _NO_MARKS)

    def _open(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is None:
                self._check_size(self._shards[shard])
                path = self._shards[shard].path_in(self.folder)
                try:
                    with path.open("rb") as file:
                        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise DataError(f"{path}: cannot open the shard: {error}") from error
                tokens = np.frombuffer(data, self._indices[shard].dtype)
                opened = _OpenShard(data, tokens, np.frombuffer(data, np.uint8))
                self._open_shards[shard] = opened
                if len(self._open_shards) > _OPEN_SHARDS:
                    self._open_shards.popitem(last=False)
            else:
                self._open_shards.move_to_end(shard)
            return opened

    def _verify(self, block: int) -> None:
        """Check a block and remember where its tokens and marks are. Two threads may do it at once: they
        write the same numbers."""
        shard = int(np.searchsorted(self._shard_blocks, block, side="right")) - 1
        opened = self._open(shard)
        number = block - int(self._shard_blocks[shard])
        try:
            decoded = read_block(opened.data, self._indices[shard], number)
            self._check_lengths(block, number, decoded)
        except DataError as error:
            raise DataError(f"{self._shards[shard].path_in(self.folder)} is damaged: {error}") from error
        # The arrays of a decoded block are views of the mapped file, so addresses give places in it.
        base = opened.octets.ctypes.data
        if isinstance(decoded, ConversationBlock) and decoded.marks is not None:
            self._mark_address[block] = decoded.marks.ctypes.data - base
        self._token_address[block] = (decoded.tokens.ctypes.data - base) // decoded.tokens.itemsize

    def _check_lengths(self, block: int, number: int, decoded: TextBlock | ConversationBlock) -> None:
        """The order of training was planned from the index: what is read must have the same lengths."""
        documents = slice(int(self._block_documents[block]), int(self._block_documents[block + 1]))
        if isinstance(decoded, TextBlock):
            same = np.array_equal(np.diff(decoded.document_starts), self.document_tokens[documents])
        else:
            same = self._same_segments(decoded, documents)
        if not same:
            raise DataError(f"block {number}: its lengths do not match the index")
        largest = int(decoded.tokens.max())
        if largest >= self.manifest.vocab_size:
            raise DataError(
                f"block {number}: token id {largest}, but the vocabulary has {self.manifest.vocab_size}"
            )

    def _same_segments(self, decoded: ConversationBlock, documents: slice) -> bool:
        lengths = np.diff(decoded.segment_starts)
        system = self.system_tokens[documents]
        segments = 2 * self.interactions[documents].astype(np.int64) + (system > 0)
        first, last = self.interaction_starts[documents.start], self.interaction_starts[documents.stop]
        expected = {
            ROLE_SYSTEM: system[system > 0],
            ROLE_QUERY: self.query_tokens[first:last],
            ROLE_ANSWER: self.answer_tokens[first:last],
        }
        return np.array_equal(np.diff(decoded.conversation_segments), segments) and all(
            np.array_equal(lengths[decoded.roles == role], values) for role, values in expected.items()
        )
