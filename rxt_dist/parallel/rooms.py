"""How much room rows of experts are given before the host knows how many there are.

Shape legend: K experts of a token, e experts of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SPARE = 1.06
_TIGHT, _WIDE = 0.98, 0.85
"""Of the room, at which it becomes another one. In between it stays, and so do the sizes of memory."""
_SPREAD = 4
"""Standard deviations, if every row were drawn by itself."""
_ALIGNMENT = 128

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
            if share is None or not _WIDE * share <= seen <= _TIGHT * share:
                self._shares[whose] = _SPARE * seen


@contextmanager
def exact_rooms() -> Iterator[None]:
    """Inside, rows are counted first: what is computed again has to have the same sizes."""
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before
