"""What lanes read: the conversations of one dataset, or of several numbered one after the other.

Shape legend: C conversations of all datasets together, n things of one read, N tokens of one read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rxt_dist.data.blocks import starts_of
from rxt_dist.data.index import UInt32Array
from rxt_dist.data.mixing import MixedPieces, by_part, gather, joined_views, turns
from rxt_dist.data.order import Int64Array
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.data.reader import BoolArray, UInt8Array


class MixedConversations(MixedPieces):
    """The interactions of several datasets; each of their conversations follows that before it."""

    parts: Sequence[InteractionPieces]

    def __init__(self, parts: Sequence[InteractionPieces], weights: Sequence[int]) -> None:
        """As :class:`MixedPieces`."""
        super().__init__(parts, weights)
        self.answer_kept: Int64Array = joined_views(parts, "answer_kept")
        """int64 [P] tokens kept of every answer."""
        self.prompt_kept: Int64Array = joined_views(parts, "prompt_kept")
        """int64 [C] tokens kept of every system prompt; 0 without one."""
        self.interaction_counts: UInt32Array = joined_views(parts, "interaction_counts")
        """uint32 [C]"""
        self.interaction_starts = starts_of(self.interaction_counts)
        """int64 [C + 1] piece that is the first interaction of each conversation; ends with P."""
        self._conversation_starts = starts_of([len(part.interaction_counts) for part in parts])

    def read_marks(self, pieces: Int64Array) -> UInt8Array:
        """Marks of the tokens of several pieces: uint8 [N]. Raises DataError on damage."""
        lengths = self.lengths[pieces]
        return gather(InteractionPieces.read_marks, self.parts, self.starts, pieces, lengths)

    def read_prompts(self, conversations: Int64Array) -> Int64Array:
        """Tokens kept of the system prompts of several conversations one after the other: int64 [N].
        Raises DataError on damage."""
        read, starts = InteractionPieces.read_prompts, self._conversation_starts
        return gather(read, self.parts, starts, conversations, self.prompt_kept[conversations])

    def lost_conversations(self, conversations: Int64Array) -> BoolArray:
        """Which conversations [n] lie in damaged blocks and are to be left out: bool [n]."""
        found = np.zeros(len(conversations), dtype=np.bool_)
        for part, own, numbers in by_part(self.parts, self._conversation_starts, conversations):
            found[own] = part.lost_conversations(numbers)
        return found


Conversations = InteractionPieces | MixedConversations


def conversation_datasets(source: Conversations) -> tuple[Sequence[InteractionPieces], Sequence[int]]:
    """The datasets of a source, and their weights."""
    return (source.parts, source.weights) if isinstance(source, MixedConversations) else ([source], [1])


def first_conversations(source: Conversations, limit: int | None) -> Int64Array:
    """The conversations of an evaluation, at most ``limit`` (None: all), in the order of their numbers.

    Several datasets take turns as in training, each in the order of its index, until all are exhausted.
    """
    parts, weights = conversation_datasets(source)
    cycle = np.array(turns(weights))
    when = []  # number of every conversation if no dataset were ever exhausted
    for number, part in enumerate(parts):
        own = np.flatnonzero(cycle == number)
        cycles, turn = np.divmod(np.arange(len(part.interaction_counts)), len(own))
        when.append(cycles * len(cycle) + own[turn])
    return np.sort(np.argsort(np.concatenate(when))[:limit])
