"""The global order of a text stage: which pieces form which pack.

Everything is a pure function of (key, piece lengths). Rank, world size, accumulation and worker count
do not appear, so every rank computes the same order and a checkpoint needs two integers.

The stream of an epoch is a permutation of all pieces; epochs follow each other without end. Packs are
cut from the stream next-fit: a pack takes pieces in order until the next one would exceed the token
budget, and it may run on into the next epoch.

Shape legend: P pieces of the source, n pieces of one pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from rxt_dist.errors import DataError
from rxt_dist.randomness import derive_key

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

_EPOCHS_KEPT = 2  # a pack touches the current epoch and the next one


def epoch_permutation(key: int, epoch: int, count: int) -> Int64Array:
    """Order of ``count`` things in ``epoch``: int64 [count], a pure function of the arguments."""
    generator = np.random.Generator(np.random.Philox(key=derive_key(key, "order", epoch)))
    return generator.permutation(count).astype(np.int64, copy=False)


@dataclass(frozen=True)
class PackCursor:
    """Place in the endless stream of pieces: ``piece`` counts pieces already taken of ``epoch``."""

    epoch: int = 0
    piece: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> PackCursor:
        """Inverse of :meth:`to_dict`. Raises DataError for missing, unknown or negative entries."""
        values = {name: state.get(name) for name in ("epoch", "piece")}
        if set(state) != set(values) or any(type(v) is not int or v < 0 for v in values.values()):
            raise DataError(f"data cursor: found {dict(state)}, valid are integers epoch >= 0 and piece >= 0")
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pack:
    """A run of pieces that are trained together: at most ``pack_tokens`` tokens."""

    pieces: Int64Array
    """[n] numbers of the pieces in the source."""
    epochs: Int64Array
    """[n] epoch in which each piece is visited (a pack may hold the end of one and the start of the next)."""


def concatenate_packs(packs: list[Pack]) -> Pack:
    """All pieces of ``packs`` in order, as one (larger) pack."""
    return Pack(np.concatenate([p.pieces for p in packs]), np.concatenate([p.epochs for p in packs]))


@dataclass(frozen=True)
class _Epoch:
    pieces: Int64Array  # [P] the permutation
    token_ends: Int64Array  # [P] tokens of the epoch up to and including each piece


def check_lengths(lengths: npt.ArrayLike, pack_tokens: int) -> Int64Array:
    """Return the lengths as int64 [P]. Raises DataError if there is no piece or one can never fit."""
    checked = np.asarray(lengths, dtype=np.int64)
    if checked.size == 0:
        raise DataError("the dataset has no pieces to pack, at least one is needed")
    if checked.min() < 1:
        raise DataError(
            f"piece {int(checked.argmin())} has {int(checked.min())} tokens, at least 1 is needed"
        )
    longest = int(checked.max())
    if longest > pack_tokens:
        raise DataError(
            f"batch.pack_tokens: {pack_tokens} is less than the longest piece ({longest} tokens, piece "
            f"{int(checked.argmax())}); it must be at least {longest}"
        )
    return checked


class PackStream:
    """Endless stream of packs over the shuffled pieces, restartable from any cursor it returned.

    Every piece occurs exactly once in every epoch. Planning is vectorised: one permutation and one
    cumulative sum an epoch, one binary search a pack.
    """

    def __init__(self, lengths: npt.ArrayLike, *, key: int, pack_tokens: int) -> None:
        """``lengths`` [P]: tokens of every piece. Raises DataError if one is longer than ``pack_tokens``."""
        self._lengths = check_lengths(lengths, pack_tokens)
        self._key = key
        self._pack_tokens = pack_tokens
        self._epochs: dict[int, _Epoch] = {}

    def next_pack(self, cursor: PackCursor) -> tuple[Pack, PackCursor]:
        """The pack that starts at ``cursor``, and the cursor after it."""
        count = len(self._lengths)
        if cursor.piece >= count:
            raise DataError(f"data cursor: piece {cursor.piece} is beyond the dataset's {count} pieces")
        pieces: list[Int64Array] = []
        epochs: list[Int64Array] = []
        epoch, start, budget = cursor.epoch, cursor.piece, self._pack_tokens
        while True:
            plan = self._epoch(epoch)
            taken = int(plan.token_ends[start - 1]) if start else 0
            stop = int(np.searchsorted(plan.token_ends, taken + budget, side="right"))
            if stop > start:
                pieces.append(plan.pieces[start:stop])
                epochs.append(np.full(stop - start, epoch, dtype=np.int64))
                budget -= int(plan.token_ends[stop - 1]) - taken
            if stop < count:
                return Pack(np.concatenate(pieces), np.concatenate(epochs)), PackCursor(epoch, stop)
            epoch, start = epoch + 1, 0

    def next_packs(self, cursor: PackCursor, count: int) -> tuple[list[Pack], PackCursor]:
        """The next ``count`` packs, and the cursor after them."""
        packs = []
        for _ in range(count):
            pack, cursor = self.next_pack(cursor)
            packs.append(pack)
        return packs, cursor

    def _epoch(self, epoch: int) -> _Epoch:
        plan = self._epochs.get(epoch)
        if plan is None:
            pieces = epoch_permutation(self._key, epoch, len(self._lengths))
            plan = _Epoch(pieces, np.cumsum(self._lengths[pieces]))
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = plan
        return plan


def packs_in_index_order(lengths: npt.ArrayLike, pack_tokens: int) -> Iterator[Pack]:
    """One pass over all pieces in index order, cut next-fit; for evaluation. All epochs are 0."""
    ends = np.cumsum(check_lengths(lengths, pack_tokens))
    start = 0
    while start < len(ends):
        taken = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, taken + pack_tokens, side="right"))
        yield Pack(np.arange(start, stop, dtype=np.int64), np.zeros(stop - start, dtype=np.int64))
        start = stop
