"""Random access to a split of a dataset: token spans of documents and interactions.

Shards are mapped into memory on first use. The first time a block is needed its crc32 is checked, it is
decoded, and its lengths are compared with the index; from then on only the place of its tokens is
remembered, so a read is an address computation and a copy, whatever the order of the reads. What is
delivered is bound to the manifest: by the hash of the index, and by the crc32 of the block in the index.

Shape legend: D documents (or conversations), I interactions, K blocks, n spans.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import ROLE_ANSWER, ROLE_QUERY, ROLE_SYSTEM, ConversationBlock, TextBlock
from rxt_dist.data.files import DatasetFiles, LocalFiles, in_parallel
from rxt_dist.data.format import ShardIndex, read_block
from rxt_dist.data.manifest import Kind, Split
from rxt_dist.data.remote import UnreachableError
from rxt_dist.data.split import SplitIndex
from rxt_dist.errors import DataError

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

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


class Dataset:
    """One split of a dataset.

    Reading is safe from several threads. Damage is reported before any token of the damaged block is
    delivered. With ``skip_corrupt`` a reader that asks :meth:`lost` first never meets it.
    """

    def __init__(
        self,
        files: DatasetFiles | Path,
        split: Split,
        *,
        skip_corrupt: bool = False,
        index: SplitIndex | None = None,
    ) -> None:
        """Load the index of the split of ``files``, or of a dataset folder; no shard is opened yet.

        ``index`` is that of the split, if it has been loaded before. With ``skip_corrupt`` a shard that is
        missing or has the wrong size is only a warning: its blocks are damaged. Without the indices there is
        no order to train in, so they must always be sound.

        Raises:
            DataError: the manifest or an index is missing or damaged, or a shard is missing or has
                another size than the manifest says.
        """
        self._files = LocalFiles(files) if isinstance(files, Path) else files
        self.split: Split = split
        self.skip_corrupt = skip_corrupt
        self.manifest = self._files.manifest
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shards = self.manifest.shards_of(split)
        index = index or SplitIndex.load(self._files, split, skip_corrupt=skip_corrupt)
        self.index = index
        self.document_tokens = index.document_tokens
        """uint32 [D] tokens of every document; of all segments of a conversation."""
        self.interactions = index.interactions
        """uint32 [D] interactions of every conversation; [0] for text."""
        self.system_tokens = index.system_tokens
        """uint32 [D] tokens of the system segment, 0 = none; [0] for text."""
        self.query_tokens = index.query_tokens
        """uint32 [I]; [0] for text."""
        self.answer_tokens = index.answer_tokens
        """uint32 [I]; [0] for text."""
        self.interaction_starts = index.interaction_starts
        """int64 [D + 1] number of the first interaction of every conversation, ends with I."""
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._token_address = np.full(len(index.blocks), _UNVERIFIED, dtype=np.int64)
        self._mark_address = np.full(len(index.blocks), _NO_MARKS, dtype=np.int64)
        self._damage: dict[int, str] = {}

    @property
    def name(self) -> str:
        """Folder or URL of the dataset, for messages."""
        return self._files.name

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
        return self.index.locate_interactions(np.asarray(interactions, dtype=np.int64))

    def lost(self, documents: Int64Array) -> BoolArray:
        """Which documents [n] cannot be read because their block is damaged: bool [n].

        Without ``skip_corrupt`` none is: reading them raises the error.
        """
        if not self.skip_corrupt:
            return np.zeros(len(documents), dtype=np.bool_)
        blocks = self.index.block_of(documents)
        unverified = np.unique(blocks[self._token_address[blocks] == _UNVERIFIED])
        self._open_together(self.index.shard_of(unverified))
        for block in unverified.tolist():
            try:
                self._verify(block)
            except UnreachableError:
                raise
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
            if not 0 <= block < len(self._token_address):
                raise DataError(
                    f"data state: {self.name} has {len(self._token_address)} blocks, found {block}"
                )
            shard, number = self.index.place(block)
            self._lose(block, f"{self._files.shard_name(self._shards[shard])} was damaged: block {number}")

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
            while len(needed := np.unique(shards[first:last])) > self._files.open_shards:
                last = first + (last - first) // 2
            self._open_together(needed)
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
        blocks = self.index.block_of(documents)
        shards = self.index.shard_of(blocks)
        unverified = np.unique(blocks[self._token_address[blocks] < 0])
        self._open_together(self.index.shard_of(unverified))
        for block in unverified.tolist():
            if block in self._damage:
                raise DataError(self._damage[block])
            self._verify(block)
        inside = self.index.document_offsets[documents].astype(np.int64) + offsets
        marks = self._mark_address[blocks]
        return shards, self._token_address[blocks] + inside, np.where(marks >= 0, marks + inside, _NO_MARKS)

    def _open(self, shard: int) -> _OpenShard:
        info = self._shards[shard]
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is not None:
                self._open_shards.move_to_end(shard)
                self._files.touch(info)
                return opened
        with self._files.open_shard(info) as file:
            try:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                name = self._files.shard_name(info)
                raise DataError(f"{name}: cannot open the shard: {error}") from error
        opened = _OpenShard(data, np.frombuffer(data, self._dtype), np.frombuffer(data, np.uint8))
        with self._lock:
            self._open_shards[shard] = opened
            while len(self._open_shards) > self._files.open_shards:
                self._open_shards.popitem(last=False)
        return opened

    def _open_together(self, shards: Int64Array) -> None:
        """Fetch those of ``shards`` that a remote dataset has to fetch, several at once, as far as they can
        be open together. What is damaged is found again by who needs it."""
        if not self._files.is_remote:
            return
        needed = np.unique(shards).tolist()
        missing = [shard for shard in needed if shard not in self._open_shards][: self._files.open_shards]

        def fetch(shard: int) -> None:
            try:
                self._open(shard)
            except UnreachableError:
                raise
            except DataError:
                pass

        if len(missing) > 1:
            list(in_parallel(fetch, missing))

    def _verify(self, block: int) -> None:
        """Check a block and remember where its tokens and marks are. Two threads may do it at once: they
        write the same numbers."""
        shard, number = self.index.place(block)
        opened = self._open(shard)
        index = ShardIndex(self.kind, self._dtype, self.index.blocks_of(shard), np.zeros(0, dtype=np.uint32))
        try:
            decoded = read_block(opened.data, index, number)
            self._check_lengths(block, number, decoded)
        except DataError as error:
            name = self._files.shard_name(self._shards[shard])
            raise DataError(f"{name} is damaged: {error}") from error
        # The arrays of a decoded block are views of the mapped file, so addresses give places in it.
        base = opened.octets.ctypes.data
        if isinstance(decoded, ConversationBlock) and decoded.marks is not None:
            self._mark_address[block] = decoded.marks.ctypes.data - base
        self._token_address[block] = (decoded.tokens.ctypes.data - base) // decoded.tokens.itemsize

    def _check_lengths(self, block: int, number: int, decoded: TextBlock | ConversationBlock) -> None:
        """The order of training was planned from the index: what is read must have the same lengths."""
        documents = self.index.documents_of(block)
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
