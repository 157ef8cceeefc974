"""Pieces: the training units of the text stages.

A piece of `joint_lm` is a document or a ``seq_len``-long part of one; a piece of `interaction_sft` is one
interaction. Lengths and numbers of targets are known from the indices alone, which is what the global
order is planned from.

Shape legend: P pieces of the source, n pieces of one read, N tokens of one read.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rxt_dist.data.manifest import Kind
from rxt_dist.data.reader import BoolArray, Dataset, Int64Array, UInt8Array
from rxt_dist.errors import DataError

logger = logging.getLogger(__name__)

BlockId = tuple[str, int]
"""A block of training data: the fingerprint of the dataset, and the number of the block in its split."""
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """One training unit: next-token targets are ``tokens[first_target:]``, each predicted from the row
    before it."""

    tokens: Int64Array
    """[n]"""
    first_target: int


class PieceSource(Protocol):
    """What packing and batching need to know of the data of a stage."""

    @property
    def fingerprint(self) -> str:
        """Identity of the pieces: dataset, split, kind of piece and sequence length."""

    @property
    def lengths(self) -> Int32Array:
        """[P] tokens of every piece, at least 1."""

    @property
    def supervised(self) -> Int32Array:
        """[P] next-token targets of every piece: its last so many tokens."""

    def read_tokens(self, pieces: Int64Array) -> Int64Array:
        """Tokens of several pieces one after the other: int64 [N]. Raises DataError on damage."""

    def read(self, piece: int) -> Piece:
        """One piece. Raises DataError on damage."""

    def lost(self, pieces: Int64Array) -> BoolArray:
        """Which pieces [n] lie in damaged blocks and are to be left out: bool [n]."""

    def damage(self) -> Mapping[BlockId, str]:
        """The damaged blocks that :meth:`lost` has met, each with a sentence."""

    def lose(self, blocks: Iterable[BlockId]) -> None:
        """Count ``blocks`` as damaged without looking at them; those of other datasets do not matter.
        Raises DataError if there is no such block."""


class _Pieces(ABC):
    """Common part of the piece sources of a dataset."""

    def __init__(self, dataset: Dataset, kind: Kind, seq_len: int) -> None:
        unit = {"text": "documents", "conversations": "conversations"}
        if dataset.kind != kind:
            raise DataError(f"{dataset.name} holds {dataset.kind}, this stage needs {kind}")
        if dataset.num_documents == 0:
            raise DataError(f"{dataset.name} has no {dataset.split} {unit[kind]}")
        self.dataset = dataset
        self.seq_len = seq_len
        self.lengths: Int32Array
        self.supervised: Int32Array

    @property
    def fingerprint(self) -> str:
        """Identity of the pieces: dataset, split, kind of piece and sequence length."""
        return f"{self.dataset.fingerprint}:{self.dataset.split}:{type(self).__name__}:{self.seq_len}"

    @abstractmethod
    def read_tokens(self, pieces: Int64Array) -> Int64Array:
        """Tokens of several pieces one after the other: int64 [N]. Raises DataError on damage."""

    def read(self, piece: int) -> Piece:
        """One piece. Raises DataError on damage."""
        first_target = int(self.lengths[piece] - self.supervised[piece])
        return Piece(self.read_tokens(np.array([piece])), first_target)

    @abstractmethod
    def documents_of(self, pieces: Int64Array) -> Int64Array:
        """Document or conversation of each piece: int64 [n]."""

    def lost(self, pieces: Int64Array) -> BoolArray:
        """Which pieces [n] lie in damaged blocks and are to be left out: bool [n]."""
        if not self.dataset.skip_corrupt:
            return np.zeros(len(pieces), dtype=np.bool_)
        return self.dataset.lost(self.documents_of(pieces))

    def damage(self) -> Mapping[BlockId, str]:
        """The damaged blocks that :meth:`lost` has met, each with a sentence."""
        return {(self.dataset.fingerprint, block): text for block, text in self.dataset.damage().items()}

    def lose(self, blocks: Iterable[BlockId]) -> None:
        """Count ``blocks`` as damaged without looking at them; those of other datasets do not matter.
        Raises DataError if there is no such block."""
        self.dataset.lose(block for dataset, block in blocks if dataset == self.dataset.fingerprint)


class TextPieces(_Pieces):
    """Documents; those longer than ``seq_len`` are split into consecutive pieces of at most ``seq_len``.

    All tokens but a piece's first are targets.
    """

    def __init__(self, dataset: Dataset, seq_len: int) -> None:
        """Raises DataError if the dataset is not text or its split is empty."""
        super().__init__(dataset, "text", seq_len)
        self.lengths = dataset.document_tokens.view(np.int32)
        self._first_piece: npt.NDArray[np.unsignedinteger[Any]] | None = None
        """[documents] number of the first piece; None: no document is split."""
        if int(dataset.document_tokens.max()) > seq_len:
            self._split(dataset.document_tokens.astype(np.int64))
        self.supervised = self.lengths - 1

    def _split(self, tokens: Int64Array) -> None:
        pieces_of_document = -(-tokens // self.seq_len)
        ends = np.cumsum(pieces_of_document)
        self.lengths = np.full(int(ends[-1]), self.seq_len, dtype=np.int32)
        self.lengths[ends - 1] = tokens - self.seq_len * (pieces_of_document - 1)
        self._first_piece = (ends - pieces_of_document).astype(np.min_scalar_type(int(ends[-1])))

    def documents_of(self, pieces: Int64Array) -> Int64Array:
        """Document of each piece: int64 [n]."""
        if self._first_piece is None:
            return pieces
        # In another type than its own the whole array would be converted for the search.
        sought = pieces.astype(self._first_piece.dtype)
        return np.searchsorted(self._first_piece, sought, side="right") - 1

    def read_tokens(self, pieces: Int64Array) -> Int64Array:
        """Tokens of several pieces one after the other: int64 [N]. Raises DataError on damage."""
        documents = self.documents_of(pieces)
        offsets = np.zeros(len(pieces), dtype=np.int64)
        if self._first_piece is not None:
            offsets = (pieces - self._first_piece[documents].astype(np.int64)) * self.seq_len
        return self.dataset.read_spans(documents, offsets, self.lengths[pieces])


class InteractionPieces(_Pieces):
    """One piece an interaction: its query, then its answer. Targets are the answer's tokens after [A],
    [EOS] included.

    An interaction longer than ``seq_len`` is cut longest-first: tokens are taken from the longer of query
    and answer until both fit (ties from the query). The query keeps its beginning; the answer keeps [A]
    and its end with [EOS].
    """

    def __init__(self, dataset: Dataset, seq_len: int) -> None:
        """Raises DataError if the dataset does not hold conversations or its split is empty."""
        super().__init__(dataset, "conversations", seq_len)
        query, answer = dataset.query_tokens.astype(np.int64), dataset.answer_tokens.astype(np.int64)
        self.query_kept, self.answer_kept = longest_first(query, answer, seq_len)
        self.lengths = (self.query_kept + self.answer_kept).astype(np.int32)
        self.supervised = (self.answer_kept - 1).astype(np.int32)
        self.truncated = int(np.count_nonzero(query + answer > seq_len))
        """Interactions of the split that were cut."""
        self.interaction_counts = dataset.interactions
        """uint32 [conversations]"""
        self.interaction_starts = dataset.interaction_starts
        """int64 [conversations + 1] piece that is the first interaction of each conversation; ends with P."""
        self.prompt_kept = np.minimum(dataset.system_tokens.astype(np.int64), seq_len)
        """int64 [conversations] tokens kept of every system prompt: its beginning; 0 without one."""
        if self.truncated:
            logger.warning(
                "%s: %d of %d %s interactions are longer than seq_len %d and are cut",
                dataset.name,
                self.truncated,
                len(self.lengths),
                dataset.split,
                seq_len,
            )

    def documents_of(self, pieces: Int64Array) -> Int64Array:
        """Conversation of each interaction: int64 [n]."""
        return self.dataset.locate_interactions(pieces)[0]

    def read_tokens(self, pieces: Int64Array) -> Int64Array:
        """Tokens of several pieces one after the other: int64 [N]. Raises DataError on damage."""
        return self.dataset.read_spans(*self._spans(pieces))

    def read_marks(self, pieces: Int64Array) -> UInt8Array:
        """Marks of the same tokens: uint8 [N], 0 where the dataset has none. Raises DataError on damage."""
        spans = self._spans(pieces)
        marks = self.dataset.read_mark_spans(*spans)
        return np.zeros(int(spans[2].sum()), dtype=np.uint8) if marks is None else marks

    def lost_conversations(self, conversations: Int64Array) -> BoolArray:
        """Which conversations [n] lie in damaged blocks and are to be left out: bool [n]."""
        return self.dataset.lost(conversations)

    def read_prompts(self, conversations: Int64Array) -> Int64Array:
        """Tokens kept of the system prompts of several conversations one after the other: int64 [N].
        Raises DataError on damage."""
        starts = np.zeros(len(conversations), dtype=np.int64)
        return self.dataset.read_spans(conversations, starts, self.prompt_kept[conversations])

    def _spans(self, pieces: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Conversations, offsets and lengths of the contiguous token spans that form the pieces: one span
        for a whole interaction; start of the query, [A] and end of the answer for one that is cut."""
        conversations, offsets = self.dataset.locate_interactions(pieces)
        query = self.dataset.query_tokens[pieces].astype(np.int64)
        answer = self.dataset.answer_tokens[pieces].astype(np.int64)
        kept = self.lengths[pieces].astype(np.int64)
        if np.array_equal(kept, query + answer):
            return conversations, offsets, kept
        whole = kept == query + answer
        tail = self.answer_kept[pieces] - 1
        starts = np.stack((offsets, offsets + query, offsets + query + answer - tail), axis=1)
        lengths = np.stack(
            (np.where(whole, kept, self.query_kept[pieces]), np.where(whole, 0, 1), np.where(whole, 0, tail)),
            axis=1,
        )
        used = lengths > 0
        return np.repeat(conversations, 3)[used.ravel()], starts[used], lengths[used]


def longest_first(query: Int64Array, answer: Int64Array, limit: int) -> tuple[Int64Array, Int64Array]:
    """Lengths kept of ``query`` and ``answer`` tokens so that their sum is at most ``limit``: int64 [P] each.

    The same as taking one token at a time from the longer of the two, and from the query if they are
    equally long.
    """
    half = limit // 2
    cut_query = np.where(query <= answer, np.minimum(query, half), limit - np.minimum(answer, limit - half))
    fits = query + answer <= limit
    return np.where(fits, query, cut_query), np.where(fits, answer, limit - cut_query)
