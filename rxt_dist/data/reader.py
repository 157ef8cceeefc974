"""Random access to a split of a dataset: token spans of documents and interactions.

Shards are mapped into memory on first use. The first time a block is needed its crc32 is checked, it is
decoded, and its lengths are compared with the index; from then on only the place of its tokens is
remembered, so a read is an address computation and a copy, whatever the order of the reads. What is
delivered is bound to the manifest: by the hash of the index, and by the crc32 of the block in the index.

Shape legend: D documents (or conversations), I interactions, K blocks, n spans.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import ROLE_ANSWER, ROLE_QUERY, ROLE_SYSTEM, ConversationBlock, TextBlock
from rxt_dist.data.format import BLOCK_DTYPE, ShardIndex, read_block
from rxt_dist.data.manifest import Kind, ShardInfo, Split, load_manifest
from rxt_dist.errors import DataError

logger = logging.getLogger(__name__)

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]
UInt8Array = npt.NDArray[np.uint8]

_OPEN_SHARDS = 256  # each holds a file descriptor
_UNVERIFIED = -1
_DAMAGED = -2
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


def _offsets(tokens: UInt32Array, block_documents: Int64Array) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Tokens before each document in its block: [D], in the least type that holds them."""
    starts = _starts(tokens)
    starts -= np.repeat(starts[block_documents], np.diff(block_documents, append=len(starts)))
    return starts[:-1].astype(np.min_scalar_type(int(starts[:-1].max(initial=0))))


class Dataset:
    """One split of a dataset folder.

    Reading is safe from several threads. Damage is reported before any token of the damaged block is
    delivered. With ``skip_corrupt`` a reader that asks :meth:`lost` first never meets it.
    """

    def __init__(self, folder: Path, split: Split, *, skip_corrupt: bool = False) -> None:
        """Load the manifest and every index of the split; no shard is opened yet.

        With ``skip_corrupt`` a shard that is missing or has the wrong size is only a warning: its blocks
        are damaged. Without the indices there is no order to train in, so they must always be sound.

        Raises:
            DataError: the manifest or an index is missing or damaged, or a shard is missing or has
                another size than the manifest says.
        """
        self.folder = folder
        self.split: Split = split
        self.skip_corrupt = skip_corrupt
        self.manifest = load_manifest(folder)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shards = self.manifest.shards_of(split)
        # Plain strings: a dataset may have 100,000 shards, and paths are slow.
        base = f"{folder / split}{os.sep}"
        indices = [
            ShardIndex.read(f"{base}{shard.name.removesuffix('.tar')}.idx", shard.idx_sha256)
            for shard in self._shards
        ]
        for shard in self._shards:
            try:
                self._check_size(shard, f"{base}{shard.name}")
            except DataError as error:
                if not skip_corrupt:
                    raise
                logger.warning("%s", error)
        self._join(indices)
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._token_address = np.full(len(self._blocks), _UNVERIFIED, dtype=np.int64)
        self._mark_address = np.full(len(self._blocks), _NO_MARKS, dtype=np.int64)
        self._damage: dict[int, str] = {}

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

    def _check_size(self, shard: ShardInfo, path: Path | str) -> None:
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise DataError(f"{path}: cannot open the shard: {error.strerror}") from error
        if size != shard.bytes:
            raise DataError(f"{path} is damaged: it has {size} bytes, the manifest says {shard.bytes}")

    def _join(self, indices: list[ShardIndex]) -> None:
        def joined(name: str) -> UInt32Array:
            parts = [getattr(index, name) for index in indices]
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
        # As bytes, because joining records compares their types one by one.
        octets = [index.blocks.view(np.uint8) for index in indices]
        self._blocks = np.concatenate([np.zeros(0, np.uint8), *octets]).view(BLOCK_DTYPE)
        self._block_documents = _starts(self._blocks["documents"])
        self._shard_blocks = _starts(np.array([len(index.blocks) for index in indices], dtype=np.int64))
        self._document_offsets = _offsets(self.document_tokens, self._block_documents)

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

    def lost(self, documents: Int64Array) -> BoolArray:
        """Which documents [n] cannot be read because their block is damaged: bool [n].

        Without ``skip_corrupt`` none is: reading them raises the error.
        """
        if not self.skip_corrupt:
            return np.zeros(len(documents), dtype=np.bool_)
        blocks = self._block_of(documents)
        for block in np.unique(blocks[self._token_address[blocks] == _UNVERIFIED]).tolist():
            try:
                self._verify(block)
            except DataError as error:
                self._lose(block, str(error))
        return np.equal(self._token_address[blocks], _DAMAGED)

    def damage(self) -> Mapping[int, str]:
        """What :meth:`lost` found so far: the message by block, numbered over the split."""
        return dict(self._damage)

    def lose(self, blocks: Iterable[int]) -> None:
        """Count ``blocks`` as damaged without looking at them: they were when the run met them.

        Raises:
            DataError: there is no such block.
        """
        for block in blocks:
            if not 0 <= block < len(self._blocks):
                raise DataError(f"data state: {self.folder} has {len(self._blocks)} blocks, found {block}")
            shard, number = self._place(block)
            self._lose(block, f"{self._shards[shard].path_in(self.folder)} was damaged: block {number}")

    def _lose(self, block: int, message: str) -> None:
        self._damage[block] = message
        self._token_address[block] = _DAMAGED

    def read_spans(
        self, documents: Int64Array, offsets: npt.NDArray[Any], lengths: npt.NDArray[Any]
    ) -> Int64Array:
        """Token spans, each inside one document: ``offsets`` [n] count tokens from the document's start.

        Returns the spans one after the other: int64 [sum of lengths].

        Raises:
            DataError: a shard cannot be opened or a block is damaged; names the shard file and the block.
        """
        shards, addresses, _ = self._locate(documents, offsets)
        runs = self._copied(shards, addresses, lengths, "tokens", np.int64)
        return runs[0] if len(runs) == 1 else np.concatenate([np.zeros(0, dtype=np.int64), *runs])

    def read_mark_spans(
        self, documents: Int64Array, offsets: npt.NDArray[Any], lengths: npt.NDArray[Any]
    ) -> UInt8Array | None:
        """The marks of the same spans: uint8 [sum of lengths]; None when no block of them has marks."""
        shards, _, addresses = self._locate(documents, offsets)
        if not (addresses >= 0).any():
            return None
        return np.concatenate(self._copied(shards, addresses, lengths, "octets", np.uint8))

    def _copied(
        self,
        shards: Int64Array,
        starts: Int64Array,
        lengths: npt.NDArray[Any],
        view: Literal["tokens", "octets"],
        dtype: type[np.generic],
    ) -> list[npt.NDArray[Any]]:
        """Spans of a view of their shards, zeros where the start is negative, in runs one after the other.

        A run has not too many shards, which are open meanwhile: they are files, and a process has few.
        """
        runs, first = [], 0
        while first < len(shards):
            last = len(shards)
            while len(needed := np.unique(shards[first:last])) > _OPEN_SHARDS:
                last = first + (last - first) // 2
            views = {shard: getattr(self._open(shard), view) for shard in needed.tolist()}
            columns = (column[first:last].tolist() for column in (shards, starts, lengths))
            parts = [
                views[shard][start : start + length] if start >= 0 else np.zeros(length, dtype)
                for shard, start, length in zip(*columns, strict=True)
            ]
            runs.append(np.concatenate(parts, dtype=dtype))
            first = last
        return runs

    def _locate(
        self, documents: Int64Array, offsets: npt.NDArray[Any]
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Shard, element of the token view, and byte of the mark (negative: no marks) where spans start."""
        blocks = self._block_of(documents)
        shards = np.searchsorted(self._shard_blocks, blocks, side="right") - 1
        for block in np.unique(blocks[self._token_address[blocks] < 0]).tolist():
            if block in self._damage:
                raise DataError(self._damage[block])
            self._verify(block)
        inside = self._document_offsets[documents].astype(np.int64) + offsets
        marks = self._mark_address[blocks]
        return shards, self._token_address[blocks] + inside, np.where(marks >= 0, marks + inside, _NO_MARKS)

    def _block_of(self, documents: Int64Array) -> Int64Array:
        return np.searchsorted(self._block_documents, documents, side="right") - 1

    def _place(self, block: int) -> tuple[int, int]:
        """Shard of a block, and the number of the block in it."""
        shard = int(np.searchsorted(self._shard_blocks, block, side="right")) - 1
        return shard, block - int(self._shard_blocks[shard])

    def _open(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is None:
                path = self._shards[shard].path_in(self.folder)
                self._check_size(self._shards[shard], path)
                try:
                    with path.open("rb") as file:
                        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise DataError(f"{path}: cannot open the shard: {error}") from error
                tokens = np.frombuffer(data, self._dtype)
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
        shard, number = self._place(block)
        opened = self._open(shard)
        rows = self._blocks[self._shard_blocks[shard] : self._shard_blocks[shard + 1]]
        index = ShardIndex(self.kind, self._dtype, rows, np.zeros(0, dtype=np.uint32))
        try:
            decoded = read_block(opened.data, index, number)
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
