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
from data_prep.records import ConversationRecord, Interaction, TextRecord, parse_chunk
from rxt_dist.data.format import (
    MAX_MARK,
    ROLE_ANSWER,
    ROLE_QUERY,
    ROLE_SYSTEM,
    ConversationTokens,
    Kind,
    encode_conversation_block,
    encode_text_block,
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


class Encoder:
    """Tokenises chunks of one kind with one tokenizer."""

    def __init__(self, tokenizer_folder: Path, kind: Kind, max_tokens: int | None) -> None:
        """``max_tokens`` limits a document or an interaction, special tokens included."""
        self._tokenizer = load_tokenizer(tokenizer_folder)
        self._ids = special_ids(self._tokenizer)
        self._kind = kind
        self._max_tokens = max_tokens
        self._dtype = token_dtype(vocabulary_size(self._tokenizer))

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Check, tokenise and truncate the records of ``chunk``.

        Raises:
            DataError: a record is malformed, naming file and line.
        """
        records = parse_chunk(chunk, self._kind)
        hashes = [record.hash for record in records]
        if self._kind == "text":
            documents, truncated = self._texts([r for r in records if isinstance(r, TextRecord)])
            return EncodedChunk(encode_text_block(documents, self._dtype), hashes, truncated)
        conversations, truncated = self._conversations(
            [r for r in records if isinstance(r, ConversationRecord)]
        )
        return EncodedChunk(encode_conversation_block(conversations, self._dtype), hashes, truncated)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def _texts(self, records: Sequence[TextRecord]) -> tuple[list[npt.NDArray[Any]], list[int]]:
        documents, truncated = [], []
        for ids in self._encode([record.text for record in records]):
            cut = self._max_tokens is not None and len(ids) + 2 > self._max_tokens
            kept = ids[: self._max_tokens - 2] if cut and self._max_tokens is not None else ids
            documents.append(np.array([self._ids[BOS], *kept, self._ids[EOS]], np.uint32))
            truncated.append(int(cut))
        return documents, truncated

    def _conversations(
        self, records: Sequence[ConversationRecord]
    ) -> tuple[list[ConversationTokens], list[int]]:
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
        return conversations, truncated

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


def start_worker(tokenizer_folder: Path, kind: Kind, max_tokens: int | None) -> None:
    """Initialise a worker process; the processes are the parallelism, so each uses one thread."""
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(tokenizer_folder, kind, max_tokens)


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
