"""Which document goes where: duplicates, splits and counts, from the small columns of all parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.parts import StoredPart
from rxt_dist.data.manifest import SPLITS, DropReason, Split

_DROPPED = 255


@dataclass
class SourceTotals:
    """[S] what became of the records of every source."""

    records: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, sources: int) -> SourceTotals:
        return cls(*(np.zeros(sources, np.int64) for _ in range(3)))


@dataclass
class Plan:
    """The fate of every document."""

    sources: SourceTotals
    fates: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    """For every part, [D]: number of the split of a document in SPLITS, or dropped."""
    truncated: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    pieces: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[DropReason, int] = field(default_factory=dict)

    def members(self, part: int, split: Split) -> npt.NDArray[np.bool_]:
        """[D] whether a document of the part belongs to ``split``."""
        return np.asarray(self.fates[part] == SPLITS.index(split))

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return sum(int((fates != _DROPPED).sum()) for fates in self.fates)


def make_plan(paths: Sequence[Path], sources: int, val_fraction: float, dedup: bool) -> Plan:
    """Decide from the parts at ``paths`` (all of them, in order); about 30 bytes of memory a document.

    Of equal records the first one that was not filtered out is kept. A validation split that was asked for
    and stayed empty gets the document with the smallest hash; an empty training split the one with the
    largest.
    """
    duplicates = _duplicates(paths) if dedup else None
    plan = Plan(SourceTotals.zeros(sources))
    dropped = dict.fromkeys(("short", "long", "duplicate"), 0)
    extremes = _Extremes()
    first_record = 0
    for number, path in enumerate(paths):
        with StoredPart(path) as part:
            documents = part.column("documents")
            keep = np.ones(int(documents.sum()), bool)
            if duplicates is not None:
                repeated = duplicates[first_record : first_record + len(documents)]
                keep = ~np.repeat(repeated, documents)
                dropped["duplicate"] += int(repeated.sum())
            first_record += len(documents)
            hashes = part.column("hashes")
            fates = np.where(_held_out(hashes, val_fraction), SPLITS.index("val"), SPLITS.index("train"))
            fates[~keep] = _DROPPED
            plan.fates.append(fates.astype(np.uint8))
            extremes.see(number, hashes, keep)
            dropped["short"] += int(part.column("short").sum())
            dropped["long"] += int(part.column("long").sum())
            _count_sources(plan.sources, part, documents, keep)
    extremes.repair(plan, val_fraction)
    _count_splits(plan, paths)
    plan.dropped = {"short": dropped["short"], "long": dropped["long"], "duplicate": dropped["duplicate"]}
    return plan


def _held_out(hashes: npt.NDArray[np.uint64], val_fraction: float) -> npt.NDArray[np.bool_]:
    return np.asarray(hashes < np.uint64(int(val_fraction * 2.0**64)))


def _duplicates(paths: Sequence[Path]) -> npt.NDArray[np.bool_]:
    """[records of all parts] whether an equal record that has documents came before."""
    keys, usable = [], []
    for path in paths:
        with StoredPart(path) as part:
            keys.append(part.column("contents"))
            usable.append(part.column("documents") > 0)
    halves = np.concatenate(keys).view("<u8")  # [records, 2]
    has_documents = np.concatenate(usable)
    candidates = np.flatnonzero(has_documents)
    order = candidates[np.lexsort((halves[candidates, 1], halves[candidates, 0]))]  # stable: first one first
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    found = np.zeros(len(has_documents), bool)
    found[order[1:][same]] = True
    return found


class _Extremes:
    """The documents with the smallest and the largest hash: (hash, part, document)."""

    def __init__(self) -> None:
        self._smallest: tuple[int, int, int] | None = None
        self._largest: tuple[int, int, int] | None = None

    def see(self, part: int, hashes: npt.NDArray[np.uint64], keep: npt.NDArray[np.bool_]) -> None:
        places = np.flatnonzero(keep)
        if not len(places):
            return
        low, high = places[np.argmin(hashes[places])], places[np.argmax(hashes[places])]
        smallest, largest = (int(hashes[low]), part, int(low)), (int(hashes[high]), part, int(high))
        if self._smallest is None or smallest[0] < self._smallest[0]:
            self._smallest = smallest
        if self._largest is None or largest[0] > self._largest[0]:
            self._largest = largest

    def repair(self, plan: Plan, val_fraction: float) -> None:
        """Give a split that should not be empty a document."""
        if self._smallest is None or self._largest is None:
            return
        counts = [sum(int(plan.members(p, split).sum()) for p in range(len(plan.fates))) for split in SPLITS]
        train, val = (counts[SPLITS.index(split)] for split in ("train", "val"))
        if train == 0:
            _, part, document = self._largest
            plan.fates[part][document] = SPLITS.index("train")
        elif val == 0 and val_fraction > 0 and train >= 2:
            _, part, document = self._smallest
            plan.fates[part][document] = SPLITS.index("val")


def _count_sources(
    totals: SourceTotals, part: StoredPart, documents: npt.NDArray[Any], keep: npt.NDArray[np.bool_]
) -> None:
    sources, size = part.sources, len(totals.records)
    totals.records += np.bincount(sources, minlength=size)
    of_document = np.repeat(sources, documents)[keep]
    totals.documents += np.bincount(of_document, minlength=size)
    weights = part.document_tokens[keep].astype(np.float64)  # exact below 2**53
    totals.tokens += np.bincount(of_document, weights, minlength=size).astype(np.int64)


def _count_splits(plan: Plan, paths: Sequence[Path]) -> None:
    for number, path in enumerate(paths):
        with StoredPart(path) as part:
            truncated, pieces = part.column("truncated"), part.column("pieces")
        for split in SPLITS:
            members = plan.members(number, split)
            plan.truncated[split] += int(truncated[members].sum())
            plan.pieces[split] += int(pieces[members].sum())
