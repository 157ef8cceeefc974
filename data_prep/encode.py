"""From records to token ids: what a worker process does with a chunk."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.inputs import Chunk
from data_prep.records import ConversationRecord, Interaction, TextRecord, parse_chunk, piece_hash
from rxt_dist.data.format import (
    MAX_MARK,
    ROLE_ANSWER,
    ROLE_QUERY,
    ROLE_SYSTEM,
    ConversationTokens,
    Kind,
    conversation_block,
    encode_block,
    text_block,
    token_dtype,
)
from rxt_dist.data.tokens import ANSWER, BOS, EOS, QUERY, load_tokenizer, special_ids

MIN_MAX_TOKENS = 8

Tokens = npt.NDArray[np.uint32]
Marks = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of a chunk as one block (compact to send between processes)."""

    members: dict[str, bytes]
    hashes: list[int]
    """64-bit hash of every document, which decides its split."""
    truncated: list[int]
    """For every document, how many of its parts (itself, interactions, system text) were truncated."""
    split: list[bool]
    """For every document, whether it is a piece of a longer one."""


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


class Encoder:
    """Tokenises chunks of one kind with one tokenizer."""

    def __init__(self, options: EncodeOptions) -> None:
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._ids = special_ids(self._tokenizer)
        self._kind = options.kind
        self._max_tokens = options.max_tokens
        self._split_documents = options.split_documents
        self._dtype = token_dtype(vocabulary_size(self._tokenizer))

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Check, tokenise and truncate the records of ``chunk``.

        Raises:
            DataError: a record is malformed, naming file and line.
        """
        records = parse_chunk(chunk, self._kind)
        if self._kind == "text":
            return self._texts([r for r in records if isinstance(r, TextRecord)])
        return self._conversations([r for r in records if isinstance(r, ConversationRecord)])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def _texts(self, records: Sequence[TextRecord]) -> EncodedChunk:
        documents: list[npt.NDArray[Any]] = []
        hashes: list[int] = []
        truncated: list[int] = []
        split: list[bool] = []
        for record, ids in zip(records, self._encode([record.text for record in records]), strict=True):
            pieces = [ids]
            if self._split_documents is not None:
                size = self._split_documents - 2  # each piece has a [BOS] and an [EOS] of its own
                pieces = [ids[start : start + size] for start in range(0, len(ids), size)] or [ids]
            for number, piece in enumerate(pieces):
                kept = piece if self._max_tokens is None else piece[: self._max_tokens - 2]
                documents.append(np.array([self._ids[BOS], *kept, self._ids[EOS]], np.uint32))
                hashes.append(record.hash if len(pieces) == 1 else piece_hash(record.hash, number))
                truncated.append(int(len(kept) < len(piece)))
                split.append(len(pieces) > 1)
        return EncodedChunk(encode_block(text_block(documents, self._dtype)), hashes, truncated, split)

    def _conversations(self, records: Sequence[ConversationRecord]) -> EncodedChunk:
        ids = iter(self._encode([text for record in records for text in record.texts()]))
        bos, eos, q, a = (self._ids[name] for name in (BOS, EOS, QUERY, ANSWER))
        conversations, truncated = [], []
        for record in records:
            segments: list[Tokens] = []
            roles: list[int] = []
            cuts = 0
            if record.system is not None:
                system = np.array([bos, *next(ids)], np.uint32)
                segments.append(system[: self._max_tokens])
                roles.append(ROLE_SYSTEM)
                cuts += len(segments[0]) < len(system)
            for _ in record.interactions:
                query = np.array([bos, q, *next(ids)], np.uint32)
                answer = np.array([a, *next(ids), eos], np.uint32)
                size = truncated_lengths(len(query), len(answer), self._max_tokens)
                cuts += size != (len(query), len(answer))
                segments += [query[: size[0]], _keep_end(answer, size[1])]
                roles += [ROLE_QUERY, ROLE_ANSWER]
            marks = self._record_marks(record, segments)
            conversations.append(ConversationTokens(list(segments), roles, marks))
            truncated.append(int(cuts))
        members = encode_block(conversation_block(conversations, self._dtype))
        hashes = [record.hash for record in records]
        return EncodedChunk(members, hashes, truncated, [False] * len(records))

    def _record_marks(
        self, record: ConversationRecord, segments: list[Tokens]
    ) -> list[npt.NDArray[Any]] | None:
        """Marks parallel to the (truncated) segments; None when the record has none."""
        if not any(interaction.marks for interaction in record.interactions):
            return None
        marks: list[npt.NDArray[Any]] = [np.zeros(len(segment), np.uint8) for segment in segments]
        first_answer = len(segments) - 2 * len(record.interactions) + 1
        for number, interaction in enumerate(record.interactions):
            if interaction.marks:
                place = first_answer + 2 * number
                marks[place] = _keep_end(self._answer_marks(interaction), len(segments[place]))
        return marks

    def _answer_marks(self, interaction: Interaction) -> Marks:
        """[tokens of the whole answer segment]: the distance of the mark that a token overlaps, else 0."""
        offsets = np.array(self._tokenizer.encode(interaction.answer).offsets, np.int64)
        values = np.zeros(len(offsets) + 2, np.uint8)  # [A] and [EOS] around the text
        for mark in interaction.marks:
            overlaps = (offsets[:, 0] < mark.end) & (offsets[:, 1] > mark.start)
            values[1:-1][overlaps] = min(mark.distance, MAX_MARK)
        return values


def _keep_end(answer: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """[A] and the last ``size - 1`` tokens, so that [EOS] stays."""
    if size == len(answer):
        return answer
    return np.concatenate([answer[:1], answer[len(answer) - size + 1 :]])


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


_worker_encoder: Encoder | None = None


def start_worker(options: EncodeOptions) -> None:
    """Initialise a worker process; the processes are the parallelism, so each uses one thread."""
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(options)


def _end_with_parent() -> None:
    """A worker of a parent that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def encode_in_worker(chunk: Chunk) -> EncodedChunk:
    """Encode ``chunk`` with the encoder of this worker process."""
    assert _worker_encoder is not None
    return _worker_encoder.encode(chunk)
