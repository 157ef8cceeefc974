"""The endless stream of conversations that lanes take from: one dataset, or several that take turns.

Conversations are dealt in a fixed cycle in which each dataset has as many turns as its weight says, so that
the shares of the conversations are exact over any whole cycle. Each dataset has an order and epochs of its
own: a permutation of all its conversations, each exactly once, and then the next permutation. From which
dataset the n-th conversation of the stream (visit n) is depends on n alone, and how many of that dataset came
before it is a sum: so any part of the stream can be computed by itself.

A place in the stream is int64 [D, 2]: the epoch of each dataset, and how many of its conversations have been
taken in it.

Shape legend: D datasets, C conversations of all datasets together, n visits of one request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rxt_dist.data.blocks import starts_of
from rxt_dist.data.mixing import turns
from rxt_dist.data.order import Int64Array, epoch_permutation
from rxt_dist.randomness import derive_key


class ConversationStream:
    """A pure function of its arguments; it keeps the permutation of one epoch of each dataset, 8 bytes a
    conversation (twice that while the next one is made)."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[int], *, key: int) -> None:
        """``sizes`` [D]: conversations of each dataset, at least 1; ``weights`` [D]: its turns in a cycle
        (common factors do not matter)."""
        self.starts = starts_of(sizes)
        """int64 [D + 1] number of the first conversation of each dataset; ends with C."""
        self._sizes = np.diff(self.starts)
        self._cycle = np.array(turns(weights))
        dealt = np.equal(self._cycle[:, None], np.arange(len(sizes)))
        self._dealt = np.concatenate((np.zeros((1, len(sizes)), np.int64), np.cumsum(dealt, axis=0)))
        """[turns + 1, D] turns that each dataset has had before a turn of the cycle."""
        one = len(sizes) == 1
        self._keys = [key if one else derive_key(key, "dataset", d) for d in range(len(sizes))]
        self._permuted: dict[int, tuple[int, Int64Array]] = {}

    def visit(self, places: Int64Array) -> int:
        """Number in the stream of the conversation that is taken at ``places``."""
        return int(self._taken(places).sum())

    def places(self, visits: Int64Array, known: Int64Array) -> Int64Array:
        """Places before each of ``visits``: int64 [n, D, 2]. ``known``: those before any visit."""
        numbers = self._first(known) + self._before(visits)
        return np.stack(np.divmod(numbers, self._sizes), axis=-1)

    def locate(self, visits: Int64Array, known: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Dataset, epoch and place in the permutation of ``visits``: int64 [n] each. ``known``: the places
        before any visit. Negative epochs are before the beginning of a dataset."""
        cycles, turn = np.divmod(visits, len(self._cycle))
        datasets = self._cycle[turn]
        before = cycles * self._dealt[-1, datasets] + self._dealt[turn, datasets]
        return datasets, *np.divmod(self._first(known)[datasets] + before, self._sizes[datasets])

    def conversations(self, visit: int, count: int, known: Int64Array) -> Int64Array:
        """Conversations of ``count`` visits from ``visit`` on, numbered over all datasets: int64 [n]."""
        datasets, epochs, places = self.locate(np.arange(visit, visit + count), known)
        found = np.empty(count, dtype=np.int64)
        for dataset in range(len(self._sizes)):
            own = np.flatnonzero(datasets == dataset) if len(self._sizes) > 1 else np.arange(count)
            cuts = np.flatnonzero(np.diff(epochs[own])) + 1
            for run in np.split(own, cuts) if len(own) else []:
                permutation = self.permutation(dataset, int(epochs[run[0]]))
                found[run] = self.starts[dataset] + permutation[places[run]]
        return found

    def permutation(self, dataset: int, epoch: int) -> Int64Array:
        """Order of the conversations of ``dataset`` in ``epoch``: int64, numbered from 0."""
        kept = self._permuted.get(dataset)
        if kept is None or kept[0] != epoch:
            size = int(self._sizes[dataset])
            self._permuted[dataset] = kept = (epoch, epoch_permutation(self._keys[dataset], epoch, size))
        return kept[1]

    def _before(self, visits: Int64Array) -> Int64Array:
        """Turns of each dataset before ``visits`` [n] of a stream that begins at 0: int64 [n, D]."""
        cycles, turn = np.divmod(visits, len(self._cycle))
        before: Int64Array = cycles[:, None] * self._dealt[-1] + self._dealt[turn]
        return before

    def _taken(self, places: Int64Array) -> Int64Array:
        """Conversations of each dataset that have been taken: int64 [D]."""
        taken: Int64Array = places[:, 0] * self._sizes + places[:, 1]
        return taken

    def _first(self, known: Int64Array) -> Int64Array:
        """What to add to the turns of each dataset to get the number of its conversation: int64 [D]. Not 0
        where the stream began in the middle of a cycle, or at a later epoch than the first."""
        taken = self._taken(known)
        before: Int64Array = self._before(taken.sum(keepdims=True))[0]
        return taken - before
