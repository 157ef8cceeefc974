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
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.errors import DataError
from rxt_dist.randomness import UInt64Array, derive_key, fold_in

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

IntArray = npt.NDArray[np.integer[Any]]

_PART_PIECES = 1 << 16  # pieces that are planned at once
_PARTS_KEPT = 2  # a pack rarely touches more than the current part and the next one
_ROUNDS = 6  # even, so that the halves end as wide as they began
_LEAST_BITS = 6  # narrower halves would have too few round functions to mix with


def epoch_permutation(key: int, epoch: int, count: int) -> Int64Array:
    """Order of ``count`` things in ``epoch``: int64 [count], a pure function of the arguments."""
    generator = np.random.Generator(np.random.Philox(key=derive_key(key, "order", epoch)))
    return generator.permutation(count).astype(np.int64, copy=False)


def permuted(key: int, places: npt.ArrayLike, count: int) -> Int64Array:
    """What stands at ``places`` [n] of a permutation of ``count`` things: int64 [n].

    The permutation is never held: a Feistel network permutes the numbers of just enough bits, and a number
    that is no thing is sent through again until it is one (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002). On average that takes less than two passes.
    """
    bits = max(_LEAST_BITS, (count - 1).bit_length())
    keys = [derive_key(key, number) for number in range(_ROUNDS)]
    table = None
    if bits == _LEAST_BITS:  # few things are sent through many times: once through for all
        table = _feistel(keys, np.arange(1 << bits, dtype=np.uint64), bits)
    found = np.asarray(places).astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        sent = found[outside]
        found[outside] = sent = _feistel(keys, sent, bits) if table is None else table[sent]
        outside = outside[sent >= count]
    return found.astype(np.int64)


def _feistel(keys: list[int], numbers: UInt64Array, bits: int) -> UInt64Array:
    """A permutation of the numbers of ``bits`` bits, applied to ``numbers``."""
    low, high = bits // 2, bits - bits // 2
    left, right = numbers >> np.uint64(low), numbers & np.uint64((1 << low) - 1)
    for key in keys:
        # ``high`` is the width of the left half, which takes part of the hash of the right one.
        mixed = left ^ (fold_in(key, right) >> np.uint64(64 - high))
        left, right, low, high = right, mixed, high, low
    return (left << np.uint64(low)) | right


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
class _Part:
    """A run of places of an epoch: at most ``_PART_PIECES``."""

    pieces: Int64Array
    """[n] the pieces at those places."""
    token_ends: Int64Array
    """[n] tokens of the run up to and including each piece."""


def check_lengths(lengths: npt.ArrayLike, pack_tokens: int) -> IntArray:
    """Return the lengths as an array [P]. Raises DataError if there is no piece or one can never fit."""
    checked = np.asarray(lengths)
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

    Every piece occurs exactly once in every epoch. Planning is vectorised, and looks only at the pieces that
    come next: whatever the number of pieces, it keeps a few MB and starts at any cursor in milliseconds.
    """

    def __init__(self, lengths: npt.ArrayLike, *, key: int, pack_tokens: int) -> None:
        """``lengths`` [P]: tokens of every piece; an integer array is not copied.

        Raises DataError if one is longer than ``pack_tokens``.
        """
        self._lengths = check_lengths(lengths, pack_tokens)
        self._key = key
        self._pack_tokens = pack_tokens
        self._parts: dict[tuple[int, int], _Part] = {}

    def next_pack(self, cursor: PackCursor) -> tuple[Pack, PackCursor]:
        """The pack that starts at ``cursor``, and the cursor after it."""
        count = len(self._lengths)
        if cursor.piece >= count:
            raise DataError(f"data cursor: piece {cursor.piece} is beyond the dataset's {count} pieces")
        pieces: list[Int64Array] = []
        epochs: list[Int64Array] = []
        epoch, place, budget = cursor.epoch, cursor.piece, self._pack_tokens
        while True:
            number, start = divmod(place, _PART_PIECES)
            part = self._part(epoch, number)
            taken = int(part.token_ends[start - 1]) if start else 0
            stop = int(np.searchsorted(part.token_ends, taken + budget, side="right"))
            if stop > start:
                pieces.append(part.pieces[start:stop])
                epochs.append(np.full(stop - start, epoch, dtype=np.int64))
                budget -= int(part.token_ends[stop - 1]) - taken
            place += stop - start
            if stop < len(part.pieces):
                return Pack(np.concatenate(pieces), np.concatenate(epochs)), PackCursor(epoch, place)
            if place == count:
                epoch, place = epoch + 1, 0

    def _part(self, epoch: int, number: int) -> _Part:
        part = self._parts.get((epoch, number))
        if part is None:
            start = number * _PART_PIECES
            places = np.arange(start, min(start + _PART_PIECES, len(self._lengths)))
            pieces = permuted(derive_key(self._key, "order", epoch), places, len(self._lengths))
            part = _Part(pieces, np.cumsum(self._lengths[pieces], dtype=np.int64))
            while len(self._parts) >= _PARTS_KEPT:
                del self._parts[min(self._parts)]
            self._parts[epoch, number] = part
        return part


def packs_in_index_order(lengths: npt.ArrayLike, pack_tokens: int) -> Iterator[Pack]:
    """One pass over all pieces in index order, cut next-fit; for evaluation. All epochs are 0."""
    ends = np.cumsum(check_lengths(lengths, pack_tokens), dtype=np.int64)
    start = 0
    while start < len(ends):
        taken = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, taken + pack_tokens, side="right"))
        yield Pack(np.arange(start, stop, dtype=np.int64), np.zeros(stop - start, dtype=np.int64))
        start = stop
