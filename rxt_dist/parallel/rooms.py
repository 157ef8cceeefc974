"""How much room rows of experts are given before the host knows how many there are.

Shape legend: K experts of a token, e experts of this rank.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SPARE = 1.06
_TIGHT, _WIDE = 0.98, 0.85
"""Of the room, at which it becomes another one. In between it stays, and so do the sizes of memory."""
_DECAY = 0.99
"""In a pass that needs less: one that needs as much as before may follow."""
_SPREAD = 4
"""Standard deviations, if every row were drawn by itself."""
_ALIGNMENT = 128
_PASSES, _MANY = 200, 20

_exact = False


class Rooms:
    """Rows that a layer's experts are expected to have, from the passes before: of own tokens and of others.

    Args:
        most: rows that a token has at most, min(K, e).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._shares: list[float | None] = [None, None]
        """Rows of a token that there is room for."""

    def of(self, tokens: tuple[int, int]) -> tuple[int, int] | None:
        """Room for the rows of so many ``tokens``; None: they have to be counted first."""
        found = []
        for count, share in zip(tokens, self._shares, strict=True):
            if count and (share is None or _exact):
                return None
            rows = (share or 0.0) * count + _SPREAD * math.sqrt(self._most * count)
            found.append(min(self._most * count, -(-math.ceil(rows) // _ALIGNMENT) * _ALIGNMENT))
        return found[0], found[1]

    def learn(self, tokens: tuple[int, int], rows: Sequence[int]) -> None:
        """So many ``tokens`` had so many ``rows``."""
        for whose, (count, number) in enumerate(zip(tokens, rows, strict=True)):
            if not count:
                continue
            seen, share = number / count, self._shares[whose]
            if share is None or seen > _TIGHT * share:
                self._shares[whose] = _SPARE * seen
            elif seen < _WIDE * share:
                self._shares[whose] = _DECAY * share


class Trial:
    """Passes in rooms of which only their end tells whether they were large enough.

    Args:
        agree: what all ranks of the expert group say, of what this one says: whether all say yes. Collective.
    """

    def __init__(self, agree: Callable[[bool], bool]) -> None:
        self._agree = agree
        self._checks: list[Callable[[], bool]] | None = None
        self._recent: deque[bool] = deque(maxlen=_PASSES)
        """Whether passes were made twice, before somebody was told that many were."""
        self._told = False

    def defer(self, fits: Callable[[], bool]) -> bool:
        """Whether ``fits``, for which the host waits, will be asked at the end of the pass."""
        if self._checks is None:
            return False
        self._checks.append(fits)
        return True

    def run(self, attempt: Callable[[], Result], undo: Callable[[], None]) -> Result:
        """The result of ``attempt``; if a rank had too little room in it, then after ``undo`` that of another
        one, for which rows are counted. Collective, where rows are not counted anyway."""
        if _exact:
            return attempt()
        checks: list[Callable[[], bool]] = []
        self._checks = checks
        try:
            result = attempt()
        finally:
            self._checks = None
        found = [fits() for fits in checks]  # all of them, as each learns how many rows there were
        enough = self._agree(all(found))
        self._note(twice=not enough)
        if enough:
            return result
        del result, checks
        undo()
        with exact_rooms():
            return attempt()

    def _note(self, *, twice: bool) -> None:
        """Say it once if many passes are made twice."""
        self._recent.append(twice)
        if sum(self._recent) > _MANY and not self._told:
            self._told = True
            logger.warning(
                "%d of the last %d passes of the decoder were made twice, as experts of a rank got more rows "
                "than in those before: their loads change a lot (expert_load_max)",
                sum(self._recent),
                len(self._recent),
            )


@contextmanager
def exact_rooms() -> Iterator[None]:
    """Inside, rows are counted first: what is computed again has to have the same sizes."""
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before
