"""What the tests of lane schedules share: windows joined, and lanes that are followed step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from rxt_dist.data.lanes import LaneSchedule, LaneState

KEY = 5
FIELDS = ("epochs", "conversations", "interactions", "visits")
unhurried = settings(deadline=None)  # a loaded machine is no failure
lanes_strategy = st.integers(1, 9)
widths_strategy = st.lists(st.integers(1, 6), min_size=1, max_size=8)

Table = dict[str, npt.NDArray[np.int64]]


def joined_windows(
    schedule: LaneSchedule, state: LaneState, widths: Iterable[int]
) -> tuple[Table, list[LaneState]]:
    """All windows joined: {field: [G, sum of widths]}, and the state after each window."""
    windows, states = [], []
    for width in widths:
        window, state = schedule.next_window(state, width)
        assert window.resets.shape == (window.epochs.shape[0], width)
        windows.append(window)
        states.append(state)
    return {name: np.concatenate([getattr(w, name) for w in windows], axis=1) for name in FIELDS}, states


def follow(
    visits: Iterator[tuple[int, int, int]], counts: Sequence[int], lanes: int, positions: int
) -> Table:
    """The same step by step: {field: [G, positions]}.

    A lane without a conversation takes the next of ``visits`` (visit, epoch, conversation), the lowest
    number first; conversation c has ``counts[c]`` interactions.
    """
    holds: list[Any] = [None] * lanes
    table = {name: np.empty((lanes, positions), dtype=np.int64) for name in FIELDS}
    for position, lane in itertools.product(range(positions), range(lanes)):
        if holds[lane] is None:
            visit, epoch, conversation = next(visits)
            holds[lane] = [epoch, conversation, 0, visit]
        for name, value in zip(FIELDS, holds[lane], strict=True):
            table[name][lane, position] = value
        holds[lane][2] += 1
        if holds[lane][2] == counts[holds[lane][1]]:
            holds[lane] = None
    return table


def assert_same(found: Table, expected: Table) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
