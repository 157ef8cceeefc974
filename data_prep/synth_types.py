"""Facts and the questions that ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class Question:
    """A question whose answer is ``before + value + after``; only ``value`` needs the fact."""

    query: str
    before: str
    value: str
    after: str


@dataclass(frozen=True)
class Fact:
    """Something a conversation can state and then ask for."""

    clause: str
    """A clause that states it; not the beginning of a sentence, without a full stop."""
    restated: str
    """The same in other words, likewise a clause."""
    questions: tuple[Question, ...]
    rewrite: Callable[[Random], Fact] | None = field(default=None, compare=False)
    """Draws the fact that replaces this one: the same subject with another value. None: it cannot change."""
