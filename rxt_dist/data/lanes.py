"""The lane schedule of the conversation stages: which interaction every lane trains on, and when.

An event simulation over the numbers of interactions of the conversations. In every position of time each
of the G lanes serves one interaction. A lane whose conversation has ended takes the next one of the endless
stream (see :mod:`rxt_dist.data.stream`); lanes that end together take in the order of their numbers. So no
lane is ever idle, every interaction is served exactly once per epoch of its dataset, and the schedule is a
pure function of (key, interaction counts, sizes and weights of the datasets, G): cutting it into windows, and
dealing lanes to ranks, cannot change it.

Shape legend: G lanes, W positions of a window, C conversations of all datasets together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.order import Int64Array
from rxt_dist.data.stream import ConversationStream
from rxt_dist.errors import DataError

BoolArray = npt.NDArray[np.bool_]

_NONE = -1  # the conversation and interaction of a lane that has had none
_LANE_ENTRIES = ("epochs", "conversations", "visits", "served")
_PLACE_ENTRIES = ("epoch", "place")
_CELLS_AHEAD = 1 << 17  # lanes x positions that are planned at once; small datasets: at most an epoch


@dataclass(frozen=True, eq=False)
class _Cells:
    """What lanes serve at some positions of time."""

    cells: Int64Array
    """[4, G, ...] epoch, conversation, visit and interaction, as the properties describe them."""

    @property
    def epochs(self) -> Int64Array:
        """Epoch of its dataset in which the conversation is visited."""
        row: Int64Array = self.cells[0]
        return row

    @property
    def conversations(self) -> Int64Array:
        row: Int64Array = self.cells[1]
        return row

    @property
    def visits(self) -> Int64Array:
        """Number of the conversation in the endless stream: different for every visit of every epoch."""
        row: Int64Array = self.cells[2]
        return row

    @property
    def interactions(self) -> Int64Array:
        """Number of the interaction in its conversation, from 0."""
        row: Int64Array = self.cells[3]
        return row


@dataclass(frozen=True, eq=False)
class LaneWindow(_Cells):
    """W consecutive positions of all lanes; every array is [G, W]."""

    @property
    def resets(self) -> BoolArray:
        """Whether a new conversation begins, which reads a fresh STM."""
        return np.equal(self.interactions, 0)


@dataclass(frozen=True, eq=False)
class LaneState(_Cells):
    """State of the schedule between two positions: a place in each dataset, and what every lane served last.

    The arrays are [G]; before its first conversation a lane has conversation and interaction -1.
    """

    places: Int64Array
    """[datasets, 2] epoch of each dataset, and how many conversations have been taken of it."""

    @property
    def epoch(self) -> int:
        """The latest epoch of any dataset."""
        latest: int = max(self.places[:, 0].tolist())
        return latest

    @property
    def served(self) -> Int64Array:
        """[G] interactions already served of the lane's conversation."""
        return self.interactions + 1

    @classmethod
    def initial(cls, lanes: int, datasets: int = 1, epoch: int = 0) -> LaneState:
        """The state before the first position of ``epoch`` of each dataset: every lane free."""
        row = np.array([[0], [_NONE], [0], [_NONE]])
        return cls(np.repeat(row, lanes, axis=1), np.array([[epoch, 0]] * datasets))

    def to_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint."""
        lists = {name: getattr(self, name).tolist() for name in _LANE_ENTRIES}
        places = [dict(zip(_PLACE_ENTRIES, place, strict=True)) for place in self.places.tolist()]
        return {"datasets": places, **lists}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> LaneState:
        """Inverse of :meth:`to_dict`. Raises DataError if entries are missing, unknown or malformed."""
        valid_names = sorted(("datasets", *_LANE_ENTRIES))
        if sorted(state) != valid_names:
            raise DataError(f"lane state: found the entries {sorted(state)}, valid are {valid_names}")
        places = _places(state["datasets"])
        for name in _LANE_ENTRIES:
            lowest, numbers = _NONE if name == "conversations" else 0, state[name]
            if not isinstance(numbers, list) or any(type(v) is not int or v < lowest for v in numbers):
                raise DataError(f"lane state: {name} is malformed, valid is a list of integers >= {lowest}")
        lists: list[Any] = [state[name] for name in _LANE_ENTRIES]
        lengths = {name: len(values) for name, values in zip(_LANE_ENTRIES, lists, strict=True)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"lane state: found lists of the lengths {lengths}, valid is one entry a lane")
        cells = np.array(lists, dtype=np.int64)
        cells[3] -= 1
        return cls(cells, places)


def _places(value: object) -> Int64Array:
    """The entry "datasets" of a state: int64 [datasets, 2]. Raises DataError if it is malformed."""
    valid = f"a list with integers >= 0 {' and '.join(_PLACE_ENTRIES)} for each dataset"
    if not isinstance(value, list) or not value:
        raise DataError(f"lane state: found datasets {value!r}, valid is {valid}")
    for place in value:
        entries = dict(place) if isinstance(place, Mapping) else {}
        whole = set(entries) == set(_PLACE_ENTRIES)
        if not whole or any(type(number) is not int or number < 0 for number in entries.values()):
            raise DataError(f"lane state: found the place {place!r} in datasets, valid is {valid}")
    return np.array([[place[name] for name in _PLACE_ENTRIES] for place in value], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Plan:
    """T consecutive positions of all lanes."""

    cells: Int64Array
    """[4, G, T], read-only."""
    places: Int64Array
    """[T + 1, datasets, 2] epoch and place of each dataset before each position."""

    @property
    def positions(self) -> int:
        return int(self.cells.shape[2])

    def window(self, start: int, stop: int) -> tuple[LaneWindow, LaneState]:
        """Positions ``start`` to ``stop``, and the state after them."""
        state = LaneState(self.cells[:, :, stop - 1], self.places[stop])
        return LaneWindow(self.cells[:, :, start:stop]), state


class LaneSchedule:
    """The schedule of a split of one dataset or several.

    A pure function of its arguments and a :class:`LaneState`. What it keeps between calls only makes it fast:
    the permutations of the stream, and a plan of ``_CELLS_AHEAD`` cells (32 bytes each), from which the
    windows that follow one another are cut.
    """

    def __init__(
        self,
        interaction_counts: npt.ArrayLike,
        *,
        key: int,
        lanes: int,
        sizes: Sequence[int] | None = None,
        weights: Sequence[int] = (1,),
    ) -> None:
        """``interaction_counts`` [C], each at least 1; an integer array is not copied. ``sizes``:
        conversations of each dataset, which follow one another in the counts (None: all are of one), and
        ``weights``: its conversations in a cycle of the stream.

        Raises:
            DataError: there is no conversation, or one without an interaction.
        """
        counts = np.asarray(interaction_counts)
        if counts.size == 0:
            raise DataError("the dataset has no conversations for the lanes, at least one is needed")
        if counts.min() < 1:
            raise DataError(f"conversation {int(counts.argmin())} has no interactions")
        self._counts = counts
        self._interactions = int(counts.sum(dtype=np.int64))
        self._stream = ConversationStream([counts.size] if sizes is None else sizes, weights, key=key)
        self._lanes = lanes
        self._planned: tuple[_Plan, int, LaneState] | None = None

    def next_window(self, state: LaneState, width: int) -> tuple[LaneWindow, LaneState]:
        """The ``width`` >= 1 positions after ``state``, and the state after them. The arrays are read-only.

        Raises:
            DataError: the state is not one of this dataset and number of lanes.
        """
        plan, start, planned_state = self._planned or (None, 0, None)
        if plan is None or planned_state is not state or start + width > plan.positions:
            self._check(state)
            windows = min(_CELLS_AHEAD, self._interactions) // (self._lanes * width)
            plan, start = self._plan(state, width * max(1, windows)), 0
        window, state = plan.window(start, start + width)
        self._planned = (plan, start + width, state)
        return window, state

    def _plan(self, state: LaneState, positions: int) -> _Plan:
        """The ``positions`` positions after ``state``."""
        lanes, first_visit = self._lanes, self._stream.visit(state.places)
        left = self._left(state)
        takers, conversations, begun = self._turns(left, state.places, positions)
        starts = np.repeat(np.arange(positions), np.diff(begun))
        visits = first_visit + np.arange(len(takers))
        held = np.flatnonzero(left)  # lanes in the middle of a conversation: it goes on at position 0
        runs = np.concatenate(
            (
                state.cells[:, held] + np.array([[0], [0], [0], [1]]),
                np.stack((self._stream.locate(visits, state.places)[1], conversations, visits, -starts)),
            ),
            axis=1,
        )  # [4, runs]; the last row is the number of the interaction at position 0, were it in the run
        lengths = np.minimum(self._counts[conversations].astype(np.int64), positions - starts)
        lengths = np.concatenate((np.minimum(left[held], positions), lengths))
        order = np.argsort(np.concatenate((held * positions, takers * positions + starts)))
        cells = np.repeat(runs[:, order], lengths[order], axis=1).reshape(4, lanes, positions)
        cells[3] += np.arange(positions)
        cells.flags.writeable = False
        places = self._stream.places(first_visit + np.array(begun), state.places)
        places.flags.writeable = False
        return _Plan(cells, places)

    def _turns(
        self, left: Int64Array, places: Int64Array, positions: int
    ) -> tuple[Int64Array, Int64Array, list[int]]:
        """Which lane takes which conversation of the stream from ``places`` on.

        Returns lanes [n] and conversations [n] in the order of the stream, and how many begin before each of
        ``positions`` + 1 positions.
        """
        # Lanes by the position at which they are free; those beyond the last one are of no interest.
        free: list[list[int]] = [[] for _ in range(2 * positions + 1)]
        for lane, position in enumerate(np.minimum(left, positions).tolist()):
            free[position].append(lane)
        takers: list[int] = []
        lengths: list[int] = []
        taken: list[Int64Array] = [np.zeros(0, dtype=np.int64)]
        begun, visit = [0], self._stream.visit(places)
        for position in range(positions):
            here = sorted(free[position])
            takers += here
            if len(takers) > len(lengths):
                expected = (positions - position) * self._lanes * len(self._counts) // self._interactions
                count = max(len(takers) - len(lengths), expected)
                taken.append(self._stream.conversations(visit + len(lengths), count, places))
                lengths += np.minimum(self._counts[taken[-1]], positions).tolist()
            for lane, length in zip(here, lengths[begun[-1] : len(takers)], strict=True):
                free[position + length].append(lane)
            begun.append(len(takers))
        return np.array(takers, dtype=np.int64), np.concatenate(taken)[: len(takers)], begun

    def _left(self, state: LaneState) -> Int64Array:
        """Interactions that each lane's conversation has left: int64 [G], 0 before its first."""
        counts = self._counts[state.conversations].astype(np.int64)
        return np.where(state.conversations == _NONE, 0, counts - state.served)

    def _check(self, state: LaneState) -> None:
        found = state.cells.shape[1]
        if found != self._lanes:
            raise DataError(f"lane state: it has {found} lanes, this run has {self._lanes}")
        sizes, total = np.diff(self._stream.starts), len(self._counts)
        if len(state.places) != len(sizes):
            raise DataError(f"lane state: it is of {len(state.places)} datasets, this stage has {len(sizes)}")
        if (state.places[:, 1] >= sizes).any() or int(state.conversations.max()) >= total:
            raise DataError(f"lane state: it is of another dataset, this one has {total} conversations")
        beyond = state.served > np.where(state.conversations < 0, 0, self._counts[state.conversations])
        if beyond.any():
            lane = int(beyond.argmax())
            raise DataError(
                f"lane state: lane {lane} has served {int(state.served[lane])} interactions of conversation "
                f"{int(state.conversations[lane])}, which has fewer: it is of another dataset"
            )
        self._check_visits(state)

    def _check_visits(self, state: LaneState) -> None:
        """The stream repeats what the lanes hold, as far as it needs no permutation of a past epoch."""
        held = state.conversations >= 0
        visits, conversations = state.visits[held], state.conversations[held]
        datasets, epochs, places = self._stream.locate(visits, state.places)
        expected = conversations.copy()
        for dataset, epoch in enumerate(state.places[:, 0].tolist()):
            here = (datasets == dataset) & (epochs == epoch)
            permutation = self._stream.permutation(dataset, epoch)
            expected[here] = self._stream.starts[dataset] + permutation[places[here]]
        if (
            (epochs != state.epochs[held]).any()
            or (visits >= self._stream.visit(state.places)).any()
            or len(np.unique(visits)) < len(visits)
            or (np.searchsorted(self._stream.starts, conversations, side="right") - 1 != datasets).any()
            or (expected != conversations).any()
        ):
            raise DataError("lane state: its conversations are not those of this dataset, seed and stage")
