"""From records to token ids: what a worker process does with a part of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.inputs import Chunk
from data_prep.records import (
    ConversationRecord,
    Interaction,
    Record,
    TextRecord,
    content_key,
    parse_chunk,
    piece_hash,
)
from rxt_dist.data.blocks import Block, ConversationBlock, TextBlock, starts_of
from rxt_dist.data.format import MAX_MARK, ROLE_ANSWER, ROLE_QUERY, ROLE_SYSTEM, Kind, token_dtype
from rxt_dist.data.tokens import ANSWER, BOS, EOS, QUERY, load_tokenizer, special_ids

MIN_MAX_TOKENS = 8

Marks = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
"""[tokens, 2]: first character of a token and the one behind its last."""


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the tokens of a record; lengths include special tokens."""

    tokenizer: Path
    """Folder that holds tokenizer.json."""
    kind: Kind
    max_tokens: int | None = None
    """Longer documents and interactions lose their excess."""
    split_documents: int | None = None
    """Longer documents become several of at most this many tokens."""
    min_tokens: int | None = None
    """Shorter documents (pieces, conversations) are dropped."""
    drop_longer: int | None = None
    """Longer records are dropped, before any is truncated or split."""
    dedup: bool = False
    """Whether the keys of the contents are needed."""


@dataclass(frozen=True)
class EncodedChunk:
    """R records as a block of D documents, and what the plan of the dataset needs to know of them."""

    block: Block
    hashes: npt.NDArray[np.uint64]
    """[D] decides the split of a document."""
    truncated: npt.NDArray[np.uint32]
    """[D] how many parts (the document, interactions, system text) were truncated."""
    pieces: npt.NDArray[np.bool_]
    """[D] whether the document is a piece of a longer one."""
    documents: npt.NDArray[np.uint32]
    """[R] documents that the record became."""
    short: npt.NDArray[np.uint32]
    """[R] documents of the record dropped as too short."""
    long: npt.NDArray[np.bool_]
    """[R] whether the record was dropped as too long."""
    contents: npt.NDArray[np.uint8]
    """[R, 16] keys of the normalised contents; [R, 0] when nobody asked."""


class _Collector:
    """Gathers the documents of a chunk in order."""

    def __init__(self, min_tokens: int | None) -> None:
        self._min_tokens = min_tokens or 0
        self.segments: list[Sequence[int]] = []
        self.lengths: list[int] = []
        self.roles = bytearray()
        self.segment_counts: list[int] = []
        self.marks: dict[int, Marks] = {}
        """By number of the segment."""
        self.hashes: list[int] = []
        self.truncated: list[int] = []
        self.pieces: list[bool] = []
        self.documents: list[int] = []
        self.short: list[int] = []
        self.long: list[bool] = []

    def begin_record(self, *, long: bool) -> None:
        self.documents.append(0)
        self.short.append(0)
        self.long.append(long)

    def add(
        self,
        segments: Sequence[Sequence[int]],
        digest: int,
        *,
        roles: bytes = b"",
        truncated: int = 0,
        piece: bool = False,
        marks: dict[int, Marks] | None = None,
    ) -> None:
        """A document of the record begun last; ``marks`` by number of the segment in the document."""
        lengths = [len(segment) for segment in segments]
        if sum(lengths) < self._min_tokens:
            self.short[-1] += 1
            return
        for number, values in (marks or {}).items():
            self.marks[len(self.lengths) + number] = values
        self.segments += segments
        self.lengths += lengths
        self.roles += roles
        self.segment_counts.append(len(segments))
        self.hashes.append(digest)
        self.truncated.append(truncated)
        self.pieces.append(piece)
        self.documents[-1] += 1

    def block(self, kind: Kind, dtype: np.dtype[Any]) -> Block:
        flat = chain.from_iterable(self.segments)
        tokens = np.fromiter(flat, dtype, count=sum(self.lengths))
        starts = starts_of(self.lengths)
        if kind == "text":
            return TextBlock(tokens, starts)
        marks: Marks | None = None
        if self.marks:
            marks = np.zeros(len(tokens), np.uint8)
            for segment, values in self.marks.items():
                marks[starts[segment] : starts[segment + 1]] = values
        roles = np.frombuffer(bytes(self.roles), np.uint8)
        return ConversationBlock(tokens, starts, roles, starts_of(self.segment_counts), marks)


class Encoder:
    """Tokenises chunks of one kind with one tokenizer."""

    def __init__(self, options: EncodeOptions) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._dtype = token_dtype(vocabulary_size(self._tokenizer))
        ids = special_ids(self._tokenizer)
        self._bos, self._eos, self._q, self._a = (ids[name] for name in (BOS, EOS, QUERY, ANSWER))

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Check, filter, tokenise, truncate and split the records of ``chunk``.

        Raises:
            DataError: a record is malformed, naming file and line.
        """
        records = parse_chunk(chunk, self._options.kind)
        found = _Collector(self._options.min_tokens)
        if self._options.kind == "text":
            self._texts([r for r in records if isinstance(r, TextRecord)], found)
        else:
            self._conversations([r for r in records if isinstance(r, ConversationRecord)], found)
        return EncodedChunk(
            block=found.block(self._options.kind, self._dtype),
            hashes=np.array(found.hashes, np.uint64),
            truncated=np.array(found.truncated, np.uint32),
            pieces=np.array(found.pieces, bool),
            documents=np.array(found.documents, np.uint32),
            short=np.array(found.short, np.uint32),
            long=np.array(found.long, bool),
            contents=self._contents(records),
        )

    def _contents(self, records: Sequence[Record]) -> npt.NDArray[np.uint8]:
        if not self._options.dedup:
            return np.zeros((len(records), 0), np.uint8)
        keys = b"".join(content_key(record) for record in records)
        return np.frombuffer(keys, np.uint8).reshape(len(records), 16)

    def _is_long(self, tokens: int) -> bool:
        return self._options.drop_longer is not None and tokens > self._options.drop_longer

    def _texts(self, records: Sequence[TextRecord], found: _Collector) -> None:
        bos, eos = self._bos, self._eos
        limit, split = self._options.max_tokens, self._options.split_documents
        encodings = self._tokenizer.encode_batch_fast([record.text for record in records])
        for record, encoding in zip(records, encodings, strict=True):
            ids = encoding.ids
            long = self._is_long(len(ids) + 2)
            found.begin_record(long=long)
            if long:
                continue
            if split is not None and len(ids) + 2 > split:
                size = split - 2  # each piece has a [BOS] and an [EOS] of its own
                for number, start in enumerate(range(0, len(ids), size)):
                    piece = [bos, *ids[start : start + size], eos]
                    found.add([piece], piece_hash(record.hash, number), piece=True)
                continue
            kept = ids if limit is None else ids[: limit - 2]
            found.add([[bos, *kept, eos]], record.hash, truncated=int(len(kept) < len(ids)))

    def _conversations(self, records: Sequence[ConversationRecord], found: _Collector) -> None:
        ids, offsets = self._distinct(records)
        limit = self._options.max_tokens
        for record in records:
            segments: list[list[int]] = []
            roles = bytearray()
            marks: dict[int, Marks] = {}
            tokens = cuts = 0
            if record.system is not None:
                system = [self._bos, *ids[record.system]]
                segments.append(system[:limit])
                roles.append(ROLE_SYSTEM)
                tokens += len(system)
                cuts += len(segments[0]) < len(system)
            for interaction in record.interactions:
                query = [self._bos, self._q, *ids[interaction.query]]
                answer = [self._a, *ids[interaction.answer], self._eos]
                size = truncated_lengths(len(query), len(answer), limit)
                tokens += len(query) + len(answer)
                if size != (len(query), len(answer)):
                    cuts += 1
                    query, answer = query[: size[0]], _keep_end(answer, size[1])
                if interaction.marks:
                    values = _answer_marks(interaction, offsets[interaction.answer])
                    marks[len(segments) + 1] = np.concatenate(
                        [values[:1], values[len(values) + 1 - len(answer) :]]
                    )
                segments += (query, answer)
                roles += bytes((ROLE_QUERY, ROLE_ANSWER))
            long = self._is_long(tokens)
            found.begin_record(long=long)
            if not long:
                found.add(segments, record.hash, roles=bytes(roles), truncated=cuts, marks=marks)

    def _distinct(
        self, records: Sequence[ConversationRecord]
    ) -> tuple[dict[str, list[int]], dict[str, Offsets]]:
        """Token ids of every text, and character spans of the tokens of every marked answer.

        Short texts ("Yes.") come again and again, so each is tokenised once; offsets cost time.
        """
        marked = list({i.answer: None for record in records for i in record.interactions if i.marks})
        known = set(marked)
        plain = list({text: None for record in records for text in record.texts() if text not in known})
        found = zip(plain, self._tokenizer.encode_batch_fast(plain), strict=True)
        ids = {text: encoding.ids for text, encoding in found}
        offsets: dict[str, Offsets] = {}
        for text, encoding in zip(marked, self._tokenizer.encode_batch(marked), strict=True):
            ids[text] = encoding.ids
            offsets[text] = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return ids, offsets


def _answer_marks(interaction: Interaction, offsets: Offsets) -> Marks:
    """[tokens of the whole answer segment]: the distance of the mark that a token overlaps, else 0."""
    values = np.zeros(len(offsets) + 2, np.uint8)  # [A] and [EOS] around the text
    for mark in interaction.marks:
        overlaps = (offsets[:, 0] < mark.end) & (offsets[:, 1] > mark.start)
        values[1:-1][overlaps] = min(mark.distance, MAX_MARK)
    return values


def _keep_end(answer: list[int], size: int) -> list[int]:
    """[A] and the last ``size - 1`` tokens, so that [EOS] stays."""
    return answer if size == len(answer) else [answer[0], *answer[len(answer) - size + 1 :]]


def truncated_lengths(query: int, answer: int, limit: int | None) -> tuple[int, int]:
    """Lengths of query and answer cut to ``limit`` together, always from the longer of the two."""
    if limit is None or query + answer <= limit:
        return query, answer
    half = limit // 2
    if query <= half:
        return query, limit - query
    if answer <= limit - half:
        return limit - answer, answer
    return half, limit - half


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest token id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
