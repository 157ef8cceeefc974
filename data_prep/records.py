"""From raw records to checked texts and conversations.

A text record is ``{"text": ...}``. A conversation record is ``{"interactions": [{"query", "answer"}, ...]}``;
a top-level ``query`` and ``answer`` are its first interaction. Both may have an ``id``; a conversation may
have a ``system`` text, and an interaction ``marks``: spans of its answer that only an earlier interaction
tells, ``[{"start": first character, "end": one past the last, "distance": interactions back}, ...]``.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.inputs import Chunk
from data_prep.readers import RawRecord
from rxt_dist.data.manifest import Kind
from rxt_dist.errors import DataError


@dataclass(frozen=True)
class Mark:
    """Characters [start, end) of an answer that can only be known from ``distance`` interactions earlier."""

    start: int
    end: int
    distance: int


@dataclass(frozen=True)
class Interaction:
    """A query and its answer."""

    query: str
    answer: str
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class TextRecord:
    """A document."""

    text: str
    record_id: str | None = None

    @property
    def hash(self) -> int:
        """Stable 64-bit hash of the id, or of the content when there is none."""
        return _hash(self.text if self.record_id is None else self.record_id)

    def texts(self) -> list[str]:
        """All texts, for the training of a tokenizer."""
        return [self.text]


@dataclass(frozen=True)
class ConversationRecord:
    """A conversation of one or more interactions."""

    interactions: list[Interaction] = field(default_factory=list)
    system: str | None = None
    record_id: str | None = None

    @property
    def hash(self) -> int:
        """Stable 64-bit hash of the id, or of the content when there is none."""
        if self.record_id is not None:
            return _hash(self.record_id)
        return _hash(json.dumps([self.system, [[i.query, i.answer] for i in self.interactions]]))

    def texts(self) -> list[str]:
        """All texts, for the training of a tokenizer."""
        texts = [] if self.system is None else [self.system]
        for interaction in self.interactions:
            texts += [interaction.query, interaction.answer]
        return texts


Record = TextRecord | ConversationRecord


def sample_key(record: Record) -> int:
    """64 bits that rank records for a sample; unrelated to the hash that holds documents out."""
    return _hash(f"sample/{record.hash}")


def content_key(record: Record) -> bytes:
    """16 bytes, equal for records that differ in case, white space and compatible characters only.

    Normalisation: Unicode NFKC, case folded, runs of white space become one space, none at the ends. What
    is compared of a conversation are its texts in order; ids and marks do not count.
    """
    normal = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in record.texts())
    has_system = isinstance(record, ConversationRecord) and record.system is not None
    joined = "\0".join([str(int(has_system)), *(text.replace("\0", " ") for text in normal)])
    return hashlib.blake2b(joined.encode(), digest_size=16).digest()


def _hash(content: str) -> int:
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def piece_hash(document: int, number: int) -> int:
    """Hash of piece ``number`` (from 0) of the document with the hash ``document``."""
    return _hash(f"{document}/{number}")


def parse_chunk(chunk: Chunk, kind: Kind | None) -> list[Record]:
    """Check and convert the records of a chunk; ``kind`` None accepts texts and conversations.

    Raises:
        DataError: naming file, line, what was found and what is valid.
    """
    records = []
    for raw in chunk.records:
        try:
            records.append(_parse(raw, kind))
        except DataError as error:
            raise DataError(f"{chunk.file}: {raw.place}: {error}") from error
    return records


def _parse(raw: RawRecord, kind: Kind | None) -> Record:
    content = _content(raw)
    if kind is None:
        kind = "text" if "text" in content else "conversations"
        if not {"text", "interactions", "query"} & content.keys():
            raise DataError("the record has neither `text` nor `interactions`")
    record_id = content.get("id")
    if record_id is not None and not isinstance(record_id, str | int):
        raise DataError(f"`id` must be a string or an integer, not {_shown(record_id)}")
    identity = None if record_id is None else str(record_id)
    if identity is not None:
        _check_unicode(identity, "id")
    if kind == "text":
        return TextRecord(_text(content, "text", "the record"), identity)
    return _conversation(content, identity)


def _content(raw: RawRecord) -> dict[str, Any]:
    if isinstance(raw.content, dict):
        return raw.content
    try:
        if raw.is_text:
            return {"text": raw.content.decode()}
        content = json.loads(raw.content)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"a record must be a JSON object, not {_shown(content)}")
    return content


def _conversation(content: Mapping[str, Any], identity: str | None) -> ConversationRecord:
    rest = content.get("interactions", [])
    if not isinstance(rest, list):
        raise DataError(f"`interactions` must be a list, not {_shown(rest)}")
    interactions = []
    if "query" in content or "answer" in content:
        interactions.append(_interaction(content, "the record"))
    for item in rest:
        where = f"interaction {len(interactions) + 1}"
        if not isinstance(item, dict):
            raise DataError(f"{where} must be an object with `query` and `answer`, not {_shown(item)}")
        interactions.append(_interaction(item, where))
    if not interactions:
        raise DataError("the conversation has no interactions; it needs at least one query and answer")
    system = _text(content, "system", "the record") if content.get("system") is not None else None
    return ConversationRecord(interactions, system, identity)


def _interaction(content: Mapping[str, Any], where: str) -> Interaction:
    query, answer = _text(content, "query", where), _text(content, "answer", where)
    marks = content.get("marks") or []
    if not isinstance(marks, list):
        raise DataError(f"`marks` of {where} must be a list, not {_shown(marks)}")
    return Interaction(query, answer, tuple(_mark(mark, len(answer), where) for mark in marks))


def _mark(content: Any, length: int, where: str) -> Mark:
    values = [content.get(key) for key in ("start", "end", "distance")] if isinstance(content, dict) else []
    integers = [value for value in values if type(value) is int]
    if len(integers) == 3:
        start, end, distance = integers
        if 0 <= start < end <= length and distance >= 1:
            return Mark(start, end, distance)
    raise DataError(
        f"a mark of {where} must have integers 0 <= start < end <= {length} and distance >= 1, "
        f"not {_shown(content)}"
    )


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    if key not in content:
        raise DataError(f"{where} has no `{key}`")
    value = content[key]
    if not isinstance(value, str):
        raise DataError(f"`{key}` of {where} must be a string, not {_shown(value)}")
    if not value:
        raise DataError(f"`{key}` of {where} is empty")
    _check_unicode(value, f"`{key}` of {where}")
    return value


def _check_unicode(value: str, what: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and cannot be encoded."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{what} has an unpaired surrogate at character {error.start}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
