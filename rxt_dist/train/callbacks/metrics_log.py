"""The run's own record: metrics.jsonl and eval.jsonl, written by rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rxt_dist.observe.metrics_file import EVALUATION_FILE, METRICS_FILE, MetricsFile
from rxt_dist.train.callbacks.base import Callback


class MetricsLog(Callback):
    """Appends logged steps and evaluations to the two files of ``run_dir``."""

    def __init__(self, run_dir: Path) -> None:
        self._metrics = MetricsFile(run_dir / METRICS_FILE)
        self._evaluations = MetricsFile(run_dir / EVALUATION_FILE)

    def on_log(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(record)

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        self._evaluations.write(record)

    def close(self) -> None:
        self._metrics.close()
        self._evaluations.close()
