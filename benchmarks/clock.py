"""Times of the phases of steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Ends of the phases of every step, on the device's clock where it has one (no synchronisation)."""

    def __init__(self, device: torch.device, phases: Sequence[str]) -> None:
        self._on_gpu = device.type == "cuda"
        self._phases = phases
        self._steps: list[list[tuple[str, Any]]] = []

    def start_step(self) -> None:
        self._steps.append([("start", self._now())])

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to ``phase``."""
        self._steps[-1].append((phase, self._now()))

    def read(self) -> list[dict[str, float]]:
        """Seconds of every phase of every step; forgets them."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        result = []
        for marks in steps:
            seconds = dict.fromkeys(self._phases, 0.0)
            for (_, before), (phase, after) in pairwise(marks):
                seconds[phase] += self._seconds(before, after)
            result.append(seconds)
        return result

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, before: Any, after: Any) -> float:
        return float(before.elapsed_time(after) / 1e3 if self._on_gpu else after - before)
