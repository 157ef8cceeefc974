"""Blocks: groups of documents as byte strings, the members that a shard stores for them.

All arrays are little-endian. A document is ``[BOS] tokens... [EOS]``. The segments of a conversation are an
optional system text ``[BOS] ...``, then in turn queries ``[BOS] [Q] ...`` and answers ``[A] ... [EOS]``.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.manifest import Kind
from rxt_dist.errors import DataError

Buffer = bytes | bytearray | memoryview | mmap.mmap
IntArray = npt.NDArray[Any]  # integers; the dtype is that of the file

ROLE_SYSTEM, ROLE_QUERY, ROLE_ANSWER = 0, 1, 2
MAX_MARK = 255

LENGTH_DTYPE = np.dtype("<u4")
_BYTE = np.dtype("u1")
TAR_BLOCK = 512
_ALLOWED_EXTENSIONS = (".bin", ".json", ".jsonl")
_MEMBER_NAME = re.compile(r"([0-9]{6,}_[0-9]{6,})\.([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned little-endian type that holds every id of the vocabulary: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class ConversationTokens:
    """One conversation: its segments in order, special tokens included."""

    segments: list[IntArray]
    roles: list[int]
    """ROLE_SYSTEM (at most one, first), then ROLE_QUERY and ROLE_ANSWER in turn."""
    marks: list[IntArray] | None = None
    """uint8 a token, parallel to ``segments``: d >= 1 says that this answer token can only be known from
    the interaction d interactions earlier (255: 255 or more), 0 is an ordinary token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment) for segment in self.segments)


@dataclass(frozen=True)
class TextBlock:
    """A decoded block of documents."""

    tokens: IntArray
    """[n], the token type of the shard, read-only."""
    document_starts: npt.NDArray[np.int64]
    """[documents + 1], ends with n."""

    @property
    def num_documents(self) -> int:
        """Documents in the block."""
        return len(self.document_starts) - 1

    def document(self, i: int) -> IntArray:
        """Tokens of document ``i`` of the block (a view)."""
        return self.tokens[self.document_starts[i] : self.document_starts[i + 1]]


@dataclass(frozen=True)
class ConversationBlock:
    """A decoded block of conversations."""

    tokens: IntArray
    """[n], the token type of the shard, read-only."""
    segment_starts: npt.NDArray[np.int64]
    """[segments + 1], ends with n."""
    roles: npt.NDArray[np.uint8]
    """[segments]"""
    conversation_segments: npt.NDArray[np.int64]
    """[conversations + 1]: the first segment of each conversation, ends with the number of segments."""
    marks: npt.NDArray[np.uint8] | None
    """[n] or None when no conversation of the block is marked."""

    @property
    def num_documents(self) -> int:
        """Conversations in the block."""
        return len(self.conversation_segments) - 1

    def document(self, i: int) -> ConversationTokens:
        """Conversation ``i`` of the block (views)."""
        segments = range(int(self.conversation_segments[i]), int(self.conversation_segments[i + 1]))
        spans = [slice(int(self.segment_starts[s]), int(self.segment_starts[s + 1])) for s in segments]
        return ConversationTokens(
            segments=[self.tokens[span] for span in spans],
            roles=[int(self.roles[s]) for s in segments],
            marks=None if self.marks is None else [self.marks[span] for span in spans],
        )


Block = TextBlock | ConversationBlock


def _joined(arrays: Sequence[IntArray], dtype: np.dtype[Any]) -> IntArray:
    """Concatenate integer arrays and convert them without losing a value."""
    joined = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    if joined.dtype != dtype and len(joined) and (joined.min() < 0 or joined.max() > np.iinfo(dtype).max):
        raise DataError(f"token id {int(joined.max())} does not fit into {dtype.name}")
    return joined.astype(dtype, copy=False)


def starts_of(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """int64 [n + 1]: where each of n parts begins when they lie one after the other; ends with the total."""
    values = np.asarray(lengths)
    starts = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, dtype=np.int64, out=starts[1:])
    return starts


def text_block(documents: Sequence[IntArray], dtype: np.dtype[Any]) -> TextBlock:
    """A block of the given documents. Raises DataError for an id that does not fit into ``dtype``."""
    return TextBlock(_joined(documents, dtype), starts_of([len(document) for document in documents]))


def conversation_block(
    conversations: Sequence[ConversationTokens], dtype: np.dtype[Any]
) -> ConversationBlock:
    """A block of the given conversations. Raises DataError for an id that does not fit into ``dtype``."""
    segments = [segment for conversation in conversations for segment in conversation.segments]
    marks: IntArray | None = None
    if any(conversation.marks is not None for conversation in conversations):
        parts: list[IntArray] = []
        for conversation in conversations:
            parts.extend(conversation.marks or [np.zeros(len(s), _BYTE) for s in conversation.segments])
        marks = _joined(parts, _BYTE)
    return ConversationBlock(
        tokens=_joined(segments, dtype),
        segment_starts=starts_of([len(segment) for segment in segments]),
        roles=np.array([role for conversation in conversations for role in conversation.roles], _BYTE),
        conversation_segments=starts_of([len(conversation.segments) for conversation in conversations]),
        marks=marks,
    )


def encode_block(block: Block) -> dict[str, bytes]:
    """Members of the block, by extension; ``marks.bin`` only when the block has marks."""
    if isinstance(block, TextBlock):
        return {"tokens.bin": block.tokens.tobytes(), "lens.bin": _lengths(block.document_starts)}
    members = {
        "tokens.bin": block.tokens.tobytes(),
        "turns.bin": _lengths(block.segment_starts),
        "roles.bin": block.roles.tobytes(),
        "convs.bin": _lengths(block.conversation_segments),
    }
    if block.marks is not None:
        members["marks.bin"] = block.marks.tobytes()
    return members


def _lengths(starts: npt.NDArray[np.int64]) -> bytes:
    return np.diff(starts).astype(LENGTH_DTYPE).tobytes()


def join_blocks(blocks: Sequence[Block]) -> Block:
    """All documents of ``blocks`` (at least one, all of one kind and token type) in order."""
    if len(blocks) == 1:
        return blocks[0]
    tokens = np.concatenate([block.tokens for block in blocks])
    if isinstance(blocks[0], TextBlock):
        texts = [block for block in blocks if isinstance(block, TextBlock)]
        return TextBlock(tokens, starts_of(np.concatenate([np.diff(b.document_starts) for b in texts])))
    parts = [block for block in blocks if isinstance(block, ConversationBlock)]
    marks = None
    if any(part.marks is not None for part in parts):
        marks = np.concatenate(
            [np.zeros(len(p.tokens), _BYTE) if p.marks is None else p.marks for p in parts]
        )
    return ConversationBlock(
        tokens=tokens,
        segment_starts=starts_of(np.concatenate([np.diff(part.segment_starts) for part in parts])),
        roles=np.concatenate([part.roles for part in parts]),
        conversation_segments=starts_of(
            np.concatenate([np.diff(part.conversation_segments) for part in parts])
        ),
        marks=marks,
    )


def slice_documents(block: Block, start: int, stop: int) -> Block:
    """Documents [start, stop) of the block as views; without marks when none of them is marked."""
    if isinstance(block, TextBlock):
        starts = block.document_starts[start : stop + 1]
        return TextBlock(block.tokens[starts[0] : starts[-1]], starts - starts[0])
    segments = block.conversation_segments[start : stop + 1]
    starts = block.segment_starts[segments[0] : segments[-1] + 1]
    marks = None if block.marks is None else block.marks[starts[0] : starts[-1]]
    return ConversationBlock(
        tokens=block.tokens[starts[0] : starts[-1]],
        segment_starts=starts - starts[0],
        roles=block.roles[segments[0] : segments[-1]],
        conversation_segments=segments - segments[0],
        marks=marks if marks is not None and marks.any() else None,
    )


def select_documents(block: Block, keep: npt.NDArray[np.bool_]) -> Block:
    """The documents whose entry of ``keep`` [documents] is true, in order."""
    if keep.all():
        return block
    if isinstance(block, TextBlock):
        lengths = np.diff(block.document_starts)
        return TextBlock(block.tokens[np.repeat(keep, lengths)], starts_of(lengths[keep]))
    sizes, lengths = np.diff(block.conversation_segments), np.diff(block.segment_starts)
    kept_segments = np.repeat(keep, sizes)
    kept_tokens = np.repeat(kept_segments, lengths)
    return ConversationBlock(
        tokens=block.tokens[kept_tokens],
        segment_starts=starts_of(lengths[kept_segments]),
        roles=block.roles[kept_segments],
        conversation_segments=starts_of(sizes[keep]),
        marks=None if block.marks is None else block.marks[kept_tokens],
    )


def document_lengths(block: Block) -> npt.NDArray[np.int64]:
    """int64 [documents]: tokens of every document or conversation."""
    if isinstance(block, TextBlock):
        return np.diff(block.document_starts)
    return np.diff(block.segment_starts[block.conversation_segments])


def _array(members: Mapping[str, Buffer], name: str, dtype: np.dtype[Any]) -> IntArray:
    if name not in members:
        raise DataError(f"block has no {name}")
    data = memoryview(members[name])
    if len(data) % dtype.itemsize:
        raise DataError(f"{name} has {len(data)} bytes, not a multiple of {dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype)


def _starts(lengths: IntArray, total: int, name: str) -> npt.NDArray[np.int64]:
    if len(lengths) == 0 or lengths.min() == 0:
        raise DataError(f"{name} holds no lengths, or a length of 0")
    starts = starts_of(lengths)
    if starts[-1] != total:
        raise DataError(f"{name} sums to {int(starts[-1])} but there are {total}")
    return starts


def decode_text_block(members: Mapping[str, Buffer], dtype: np.dtype[Any]) -> TextBlock:
    """Inverse of :func:`encode_block` for text; the tokens are a view of the member.

    Raises:
        DataError: a member is missing or the lengths contradict each other.
    """
    tokens = _array(members, "tokens.bin", dtype)
    return TextBlock(tokens, _starts(_array(members, "lens.bin", LENGTH_DTYPE), len(tokens), "lens.bin"))


def decode_conversation_block(members: Mapping[str, Buffer], dtype: np.dtype[Any]) -> ConversationBlock:
    """Inverse of :func:`encode_block` for conversations; tokens, roles and marks are views of the members.

    Raises:
        DataError: a member is missing, lengths contradict each other, or the roles are out of order.
    """
    tokens = _array(members, "tokens.bin", dtype)
    roles = _array(members, "roles.bin", _BYTE)
    segment_starts = _starts(_array(members, "turns.bin", LENGTH_DTYPE), len(tokens), "turns.bin")
    if len(roles) != len(segment_starts) - 1:
        raise DataError(f"roles.bin has {len(roles)} roles for {len(segment_starts) - 1} segments")
    first = _starts(_array(members, "convs.bin", LENGTH_DTYPE), len(roles), "convs.bin")
    _check_roles(roles, first)
    marks = _array(members, "marks.bin", _BYTE) if "marks.bin" in members else None
    if marks is not None and len(marks) != len(tokens):
        raise DataError(f"marks.bin has {len(marks)} marks for {len(tokens)} tokens")
    return ConversationBlock(tokens, segment_starts, roles, first, marks)


def _check_roles(roles: IntArray, first: npt.NDArray[np.int64]) -> None:
    """A conversation is [system] (query answer)+."""
    previous = np.roll(roles, 1)
    previous[first[:-1]] = ROLE_ANSWER  # a conversation may begin with what may follow an answer
    starts = np.zeros(len(roles), dtype=bool)
    starts[first[:-1]] = True
    query = (roles == ROLE_QUERY) & (previous != ROLE_QUERY)
    answer = (roles == ROLE_ANSWER) & (previous == ROLE_QUERY)
    system = (roles == ROLE_SYSTEM) & starts
    if not (query | answer | system).all() or (roles[first[1:] - 1] != ROLE_ANSWER).any():
        raise DataError("roles.bin is not [system] then query and answer in turn")


def decode_block(members: Mapping[str, Buffer], kind: Kind, dtype: np.dtype[Any]) -> Block:
    """Inverse of :func:`encode_block`. Raises DataError for members that contradict each other."""
    return (decode_text_block if kind == "text" else decode_conversation_block)(members, dtype)


def block_key(header: bytes) -> str:
    """The key ``SHARD_BLOCK`` of the block that begins with the tar header ``header`` [512 bytes].

    Raises:
        DataError: it is no header of a member of a block.
    """
    name, _ = _parse_header(header)
    match = _MEMBER_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"member name {name!r} is not allowed")
    return match[1]


def parse_members(span: memoryview) -> dict[str, Buffer]:
    """The members of one block by extension, from the tar headers in its byte span."""
    members: dict[str, Buffer] = {}
    key, position = None, 0
    while position < len(span):
        name, size = _parse_header(bytes(span[position : position + TAR_BLOCK]))
        match = _MEMBER_NAME.fullmatch(name)
        if match is None or not name.endswith(_ALLOWED_EXTENSIONS):
            raise DataError(f"member name {name!r} is not allowed")
        if key not in (None, match[1]) or match[2] in members:
            raise DataError(f"member {name!r} does not belong to this block")
        position += TAR_BLOCK
        if position + size > len(span):
            raise DataError(f"member {name!r} is larger than its block")
        key = match[1]
        members[match[2]] = span[position : position + size]
        position += -(-size // TAR_BLOCK) * TAR_BLOCK
    return members


def _parse_header(header: bytes) -> tuple[str, int]:
    """Name and size of a plain USTAR member."""
    if len(header) < TAR_BLOCK or header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
        raise DataError("not the header of a plain file")
    try:
        recorded = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0"), 8)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError as error:
        raise DataError("malformed tar header") from error
    if recorded != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise DataError("wrong checksum of a tar header")
    if size < 0 or header[345:500].strip(b"\0"):
        raise DataError("malformed tar header")
    return name, size
