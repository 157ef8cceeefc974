"""Several datasets in one stage: their pieces as one source, and which pack comes from which.

Every pack holds pieces of one dataset. The datasets take turns in a fixed cycle in which each of them has as
many packs as its weight says: the shares of the packs are exact over a cycle, and those of the tokens but for
the fill of the packs. Each dataset has an order and epochs of its own: all its pieces, each exactly once, and
then the next permutation. (How lanes take conversations of several datasets: :mod:`rxt_dist.data.stream`.)

Shape legend: P pieces of all datasets together, n pieces of one read, N tokens of one read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import starts_of
from rxt_dist.data.order import Int64Array, Pack, PackCursor, PackStream, packs_in_index_order
from rxt_dist.data.pieces import BlockId, Int32Array, InteractionPieces, Piece, PieceSource, TextPieces
from rxt_dist.data.reader import BoolArray
from rxt_dist.errors import DataError
from rxt_dist.randomness import derive_key

PartT = TypeVar("PartT", bound=PieceSource)
NumberT = TypeVar("NumberT", bound=np.generic)


class MixedPieces:
    """The pieces of several datasets, numbered one dataset after the other: a piece source."""

    def __init__(self, parts: Sequence[TextPieces | InteractionPieces], weights: Sequence[int]) -> None:
        """``weights``: packs (in lanes: conversations) of each dataset in a cycle, at least 1; common factors
        do not matter.

        The arrays of the parts become views of the joined ones.

        Raises:
            DataError: the datasets were not made with the same tokenizer.
        """
        first = parts[0].dataset
        for part in parts[1:]:
            if part.dataset.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise DataError(
                    f"{part.dataset.name} was not made with the tokenizer of {first.name}; datasets that "
                    "are mixed must share one"
                )
        self.parts: Sequence[TextPieces | InteractionPieces] = list(parts)
        self.weights = list(weights)
        self.lengths: Int32Array = joined_views(parts, "lengths")
        self.supervised: Int32Array = joined_views(parts, "supervised")
        self.starts = starts_of([len(part.lengths) for part in parts])
        """int64 [parts + 1] number of the first piece of each dataset; ends with P."""

    @property
    def fingerprint(self) -> str:
        """Identity of the pieces and of their shares."""
        pairs = zip(self.weights, self.parts, strict=True)
        named = "+".join(f"{weight}*{part.fingerprint}" for weight, part in pairs)
        return hashlib.sha256(named.encode()).hexdigest()

    def read_tokens(self, pieces: Int64Array) -> Int64Array:
        """Tokens of several pieces one after the other: int64 [N]. Raises DataError on damage."""
        return gather(_read_tokens, self.parts, self.starts, pieces, self.lengths[pieces])

    def read(self, piece: int) -> Piece:
        """One piece. Raises DataError on damage."""
        part = int(np.searchsorted(self.starts, piece, side="right")) - 1
        return self.parts[part].read(piece - int(self.starts[part]))

    def lost(self, pieces: Int64Array) -> BoolArray:
        """Which pieces [n] lie in damaged blocks and are to be left out: bool [n]."""
        found = np.zeros(len(pieces), dtype=np.bool_)
        for part, own, numbers in by_part(self.parts, self.starts, pieces):
            found[own] = part.lost(numbers)
        return found

    def damage(self) -> Mapping[BlockId, str]:
        """The damaged blocks that :meth:`lost` has met, each with a sentence."""
        return {block: message for part in self.parts for block, message in part.damage().items()}

    def lose(self, blocks: Iterable[BlockId]) -> None:
        """Count ``blocks`` as damaged without looking at them; those of other datasets do not matter.
        Raises DataError if there is no such block."""
        blocks = list(blocks)
        for part in self.parts:
            part.lose(blocks)


def _read_tokens(part: PieceSource, pieces: Int64Array) -> Int64Array:
    return part.read_tokens(pieces)


def by_part(
    parts: Sequence[PartT], starts: Int64Array, numbers: Int64Array
) -> Iterator[tuple[PartT, BoolArray, Int64Array]]:
    """Every part that has some of ``numbers`` [n]: which of them bool [n], and their numbers in the part.
    ``starts`` [parts + 1]: the first number of each part."""
    part_of = np.searchsorted(starts, numbers, side="right") - 1
    for number in np.unique(part_of).tolist():
        own = part_of == number
        yield parts[number], own, numbers[own] - starts[number]


def gather(
    read: Callable[[PartT, Int64Array], npt.NDArray[NumberT]],
    parts: Sequence[PartT],
    starts: Int64Array,
    numbers: Int64Array,
    lengths: npt.NDArray[Any],
) -> npt.NDArray[NumberT]:
    """What ``read`` gives for ``numbers`` [n], the results one after the other; each has ``lengths`` [n]
    entries. Every part is asked once."""
    found = [(own, read(part, inside)) for part, own, inside in by_part(parts, starts, numbers)]
    if len(found) <= 1:
        return found[0][1] if found else read(parts[0], numbers)
    joined = np.empty(int(lengths.sum(dtype=np.int64)), dtype=found[0][1].dtype)
    for own, values in found:
        joined[np.repeat(own, lengths)] = values
    return joined


def joined_views(parts: Sequence[object], name: str) -> Any:
    """An array that all parts have, one after the other; those of the parts become views of it."""
    arrays = [getattr(part, name) for part in parts]
    joined = np.concatenate(arrays)
    starts = starts_of([len(array) for array in arrays])
    for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
        setattr(part, name, joined[start:stop])
    return joined


@dataclass(frozen=True)
class MixCursor:
    """Place in the endless stream of packs: all that a text stage must remember of its data."""

    pack: int
    """Packs taken so far of all datasets."""
    parts: tuple[PackCursor, ...]
    """Place in each of them."""

    @classmethod
    def initial(cls, parts: int, epoch: int = 0) -> MixCursor:
        """The beginning of ``epoch`` of each of ``parts`` datasets."""
        return cls(0, (PackCursor(epoch),) * parts)

    @property
    def epoch(self) -> int:
        """The latest epoch of any dataset."""
        return max(part.epoch for part in self.parts)

    def to_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint."""
        return {"pack": self.pack, "datasets": [part.to_dict() for part in self.parts]}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> MixCursor:
        """Inverse of :meth:`to_dict`. Raises DataError for missing, unknown or malformed entries."""
        pack, parts = state.get("pack"), state.get("datasets")
        if set(state) != {"pack", "datasets"} or type(pack) is not int or pack < 0:
            raise DataError(f"data cursor: found {dict(state)}, valid are an integer pack >= 0 and datasets")
        if not isinstance(parts, list) or not parts or not all(isinstance(p, Mapping) for p in parts):
            raise DataError(f"data cursor: found datasets {parts!r}, valid is a list of places")
        return cls(pack, tuple(PackCursor.from_dict(part) for part in parts))


class PackMixer:
    """Endless stream of packs of all datasets of a source, restartable from any cursor it returned."""

    def __init__(self, source: PieceSource, *, key: int, pack_tokens: int) -> None:
        """Raises DataError if a piece is longer than ``pack_tokens``."""
        parts, starts, weights = _parts(source)
        self._starts = starts
        self._cycle = turns(weights)
        self._streams = [
            PackStream(part.lengths, key=derive_key(key, "dataset", number), pack_tokens=pack_tokens)
            for number, part in enumerate(parts)
        ]

    def first(self) -> MixCursor:
        """The cursor before the first pack."""
        return MixCursor.initial(len(self._streams))

    def next_packs(self, cursor: MixCursor, count: int) -> tuple[list[Pack], MixCursor]:
        """The next ``count`` packs, and the cursor after them.

        Raises:
            DataError: the cursor is not one of these datasets.
        """
        if len(cursor.parts) != len(self._streams):
            raise DataError(
                f"data cursor: it is of {len(cursor.parts)} datasets, this stage has {len(self._streams)}"
            )
        places, packs = list(cursor.parts), []
        for number in range(cursor.pack, cursor.pack + count):
            part = self._cycle[number % len(self._cycle)]
            pack, places[part] = self._streams[part].next_pack(places[part])
            packs.append(Pack(pack.pieces + self._starts[part], pack.epochs))
        return packs, MixCursor(cursor.pack + count, tuple(places))


def mixed_in_index_order(source: PieceSource, pack_tokens: int) -> Iterator[Pack]:
    """One pass over all pieces for evaluation: the datasets take turns as in training until all are
    exhausted. All epochs are 0."""
    parts, starts, weights = _parts(source)
    passes = {number: packs_in_index_order(part.lengths, pack_tokens) for number, part in enumerate(parts)}
    cycle = turns(weights)
    while passes:
        for number in cycle:
            pack = next(passes[number], None) if number in passes else None
            if pack is None:
                passes.pop(number, None)
            else:
                yield Pack(pack.pieces + starts[number], pack.epochs)


def _parts(source: PieceSource) -> tuple[Sequence[PieceSource], npt.NDArray[np.int64], Sequence[int]]:
    """The datasets of a source, the number of the first piece of each, and the weights."""
    if isinstance(source, MixedPieces):
        return source.parts, source.starts, source.weights
    return [source], np.zeros(1, dtype=np.int64), [1]


def turns(weights: Sequence[int]) -> list[int]:
    """The cycle of datasets: number i occurs ``weights[i]`` times (less common factors), spread evenly.

    At each turn every dataset gains its weight, and the one that has most pays the sum of all.
    """
    divisor = math.gcd(*weights)
    shares = [weight // divisor for weight in weights]
    owed, cycle = [0] * len(shares), []
    for _ in range(sum(shares)):
        owed = [have + share for have, share in zip(owed, shares, strict=True)]
        number = owed.index(max(owed))
        owed[number] -= sum(shares)
        cycle.append(number)
    return cycle
