"""The lane schedule of the conversation stages: which interaction every lane trains on, and when.

An event simulation over the numbers of interactions of the conversations. In every position of time each
of the G lanes serves one interaction. A lane whose conversation has ended takes the next one of the endless
stream (a permutation of all conversations per epoch, epoch after epoch); lanes that end together take in
the order of their numbers. So no lane is ever idle, every interaction is served exactly once per epoch,
and the schedule is a pure function of (key, interaction counts, G): cutting it into windows, and dealing
lanes to ranks, cannot change it.

Shape legend: G lanes, W positions of a window, C conversations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.order import Int64Array, epoch_permutation
from rxt_dist.errors import DataError

BoolArray = npt.NDArray[np.bool_]

_NO_CONVERSATION = -1


@dataclass(frozen=True, eq=False)
class LaneState:
    """State of the schedule between two positions: a place in the stream and what every lane holds."""

    epoch: int
    """Epoch of the next conversation of the stream."""
    place: int
    """Conversations already taken of that epoch."""
    epochs: Int64Array
    """[G] epoch of the lane's conversation."""
    conversations: Int64Array
    """[G] the lane's conversation, -1 before its first."""
    served: Int64Array
    """[G] interactions already served of it."""
    visits: Int64Array
    """[G] number of the conversation in the endless stream."""

    @classmethod
    def initial(cls, lanes: int) -> LaneState:
        """The state before the first position: nothing taken, every lane free."""
        zeros = np.zeros(lanes, dtype=np.int64)
        return cls(0, 0, zeros, np.full(lanes, _NO_CONVERSATION, dtype=np.int64), zeros, zeros)

    def to_dict(self) -> dict[str, int | list[int]]:
        """Plain data for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> LaneState:
        """Inverse of :meth:`to_dict`. Raises DataError if entries are missing, unknown or malformed."""
        if set(state) != {field.name for field in fields(cls)}:
            raise DataError(f"lane state: found the entries {sorted(state)}, valid are {cls._names()}")
        values: dict[str, int | Int64Array] = {}
        for name, value in state.items():
            lowest = _NO_CONVERSATION if name == "conversations" else 0
            is_list = name not in ("epoch", "place")
            numbers: list[Any] = value if isinstance(value, list) else [value]
            if isinstance(value, list) != is_list or any(type(v) is not int or v < lowest for v in numbers):
                valid = "a list of integers" if is_list else "an integer"
                raise DataError(f"lane state: {name} is malformed, valid is {valid} >= {lowest}")
            values[name] = np.array(numbers, dtype=np.int64) if is_list else numbers[0]
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def _names(cls) -> list[str]:
        return sorted(field.name for field in fields(cls))


@dataclass(frozen=True, eq=False)
class LaneWindow:
    """W consecutive positions of all lanes; every array is [G, W]."""

    epochs: Int64Array
    """Epoch in which the conversation is visited."""
    conversations: Int64Array
    interactions: Int64Array
    """Number of the interaction in its conversation, from 0."""
    visits: Int64Array
    """Number of the conversation in the endless stream: different for every visit of every epoch."""

    @property
    def resets(self) -> BoolArray:
        """Whether a new conversation begins, which reads a fresh STM."""
        return np.equal(self.interactions, 0)


class LaneSchedule:
    """The schedule of one dataset split. Stateless but for a cache: all state is in :class:`LaneState`."""

    def __init__(self, interaction_counts: npt.ArrayLike, *, key: int, lanes: int) -> None:
        """``interaction_counts`` [C], each at least 1.

        Raises:
            DataError: there is no conversation, or one without an interaction.
        """
        self._counts = np.asarray(interaction_counts, dtype=np.int64)
        if self._counts.size == 0:
            raise DataError("the dataset has no conversations for the lanes, at least one is needed")
        if self._counts.min() < 1:
            raise DataError(f"conversation {int(self._counts.argmin())} has no interactions")
        self._key = key
        self._lanes = lanes
        self._cached: tuple[int, Int64Array] = (-1, self._counts)

    def next_window(self, state: LaneState, width: int) -> tuple[LaneWindow, LaneState]:
        """The ``width`` positions after ``state``, and the state after them.

        Raises:
            DataError: the state is not one of this dataset and number of lanes.
        """
        self._check(state)
        epoch, place = state.epoch, state.place
        held = np.stack((state.epochs, state.conversations, state.visits))  # [3, G]
        served = state.served.copy()
        left = np.where(held[1] == _NO_CONVERSATION, 0, self._counts[held[1]] - served)
        window = np.empty((4, self._lanes, width), dtype=np.int64)
        for position in range(width):
            free = np.flatnonzero(left == 0)
            if free.size:
                held[:, free], epoch, place = self._take(epoch, place, free.size)
                left[free] = self._counts[held[1, free]]
                served[free] = 0
            window[:3, :, position] = held
            window[3, :, position] = served
            served += 1
            left -= 1
        epochs, conversations, visits = held
        return (
            LaneWindow(epochs=window[0], conversations=window[1], interactions=window[3], visits=window[2]),
            LaneState(epoch, place, epochs, conversations, served, visits),
        )

    def _take(self, epoch: int, place: int, count: int) -> tuple[Int64Array, int, int]:
        """The next ``count`` conversations of the stream: rows (epoch, conversation, visit) [3, count], and
        the place after them."""
        total = len(self._counts)
        parts: list[Int64Array] = []
        while count:
            stop = min(place + count, total)
            places = np.arange(place, stop)
            conversations = self._permutation(epoch)[place:stop]
            parts.append(np.stack((np.full(stop - place, epoch), conversations, epoch * total + places)))
            count -= stop - place
            epoch, place = (epoch + 1, 0) if stop == total else (epoch, stop)
        return np.concatenate(parts, axis=1), epoch, place

    def _permutation(self, epoch: int) -> Int64Array:
        if self._cached[0] != epoch:
            self._cached = (epoch, epoch_permutation(self._key, epoch, len(self._counts)))
        return self._cached[1]

    def _check(self, state: LaneState) -> None:
        arrays = (state.epochs, state.conversations, state.served, state.visits)
        if any(array.shape != (self._lanes,) for array in arrays):
            found = sorted({len(array) for array in arrays})
            raise DataError(f"lane state: it has {found} lanes, this run has {self._lanes}")
        total = len(self._counts)
        if state.place >= total or int(state.conversations.max()) >= total:
            raise DataError(f"lane state: it is of another dataset, this one has {total} conversations")
        beyond = state.served > np.where(state.conversations < 0, 0, self._counts[state.conversations])
        if beyond.any():
            lane = int(beyond.argmax())
            raise DataError(
                f"lane state: lane {lane} has served {int(state.served[lane])} interactions of conversation "
                f"{int(state.conversations[lane])}, which has fewer: it is of another dataset"
            )
