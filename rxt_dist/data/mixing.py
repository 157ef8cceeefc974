"""Several datasets in one stage: which pack comes from which.

Every pack holds pieces of one dataset. The datasets take turns in a fixed cycle in which each of them has as
many packs as its weight says: the shares of the packs are exact over a cycle, and those of the tokens but for
the fill of the packs. Each dataset has an order and epochs of its own: all its pieces, each exactly once, and
then the next permutation.

Shape legend: P pieces of all datasets together, n pieces of one read, N tokens of one read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rxt_dist.data.order import Int64Array, Pack, PackCursor, PackStream, packs_in_index_order
from rxt_dist.data.pieces import BlockId, Int32Array, InteractionPieces, Piece, PieceSource, TextPieces
from rxt_dist.data.reader import BoolArray
from rxt_dist.errors import DataError
from rxt_dist.randomness import derive_key


class MixedPieces:
    """The pieces of several datasets, numbered one dataset after the other: a piece source."""

    def __init__(self, parts: Sequence[TextPieces | InteractionPieces], weights: Sequence[int]) -> None:
        """``weights``: packs of each dataset in a cycle, at least 1 (common factors do not matter).

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
        self.parts = list(parts)
        self.weights = list(weights)
        self.lengths: Int32Array = np.concatenate([part.lengths for part in parts])
        self.supervised: Int32Array = np.concatenate([part.supervised for part in parts])
        self.starts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        """int64 [parts + 1] number of the first piece of each dataset; ends with P."""
        for part, start, stop in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            part.lengths, part.supervised = self.lengths[start:stop], self.supervised[start:stop]

    @property
    def fingerprint(self) -> str:
        """Identity of the pieces and of their shares."""
        pairs = zip(self.weights, self.parts, strict=True)
        named = "+".join(f"{weight}*{part.fingerprint}" for weight, part in pairs)
        return hashlib.sha256(named.encode()).hexdigest()

    def read_tokens(self, pieces: Int64Array) -> Int64Array:
        """Tokens of several pieces one after the other: int64 [N]. Raises DataError on damage."""
        # A pack holds pieces of one dataset, so the runs are few and long.
        part_of = np.searchsorted(self.starts, pieces, side="right") - 1
        cuts = np.flatnonzero(np.diff(part_of)) + 1
        runs = zip(np.split(pieces, cuts), part_of[[0, *cuts]] if len(pieces) else [], strict=False)
        read = [self.parts[part].read_tokens(run - self.starts[part]) for run, part in runs]
        return np.concatenate([np.zeros(0, dtype=np.int64), *read])

    def read(self, piece: int) -> Piece:
        """One piece. Raises DataError on damage."""
        part = int(np.searchsorted(self.starts, piece, side="right")) - 1
        return self.parts[part].read(piece - int(self.starts[part]))

    def lost(self, pieces: Int64Array) -> BoolArray:
        """Which pieces [n] lie in damaged blocks and are to be left out: bool [n]."""
        found = np.zeros(len(pieces), dtype=np.bool_)
        for part, start, stop in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            inside = np.flatnonzero((pieces >= start) & (pieces < stop))
            found[inside] = part.lost(pieces[inside] - start)
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
