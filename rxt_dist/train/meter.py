"""Speed of the training loop between two log lines."""

from __future__ import annotations

import time


class Meter:
    """Wall time and tokens since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start anew, so that what happened in between (a save) is not counted as training."""
        self._started = time.perf_counter()
        self._steps = 0
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count a step of ``tokens`` real tokens over all ranks."""
        self._steps += 1
        self._tokens += tokens

    def read(self) -> tuple[float, float]:
        """Seconds a step and tokens a second since the last reading, which this call ends."""
        elapsed = time.perf_counter() - self._started
        result = elapsed / max(1, self._steps), self._tokens / max(elapsed, 1e-9)
        self.restart()
        return result
