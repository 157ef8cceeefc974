"""What monitoring costs a training process: one step's updates, one scrape, one metrics line.

Prints microseconds, the median of many repetitions: run it on an idle machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import generate_latest

from rxt_dist.observe.metrics import TrainMetrics
from rxt_dist.observe.metrics_file import MetricsFile

REPETITIONS = 2000


def median_microseconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def main() -> None:
    metrics = TrainMetrics()
    losses = {"loss": 3.0, "mlm_loss": 1.5, "ar_loss": 1.5}
    record = {"step": 1, "stage": "joint_lm", **losses, "grad_norm": 1.0, "lr": 1e-4, "tokens": 4096}

    def update() -> None:
        metrics.record_step(1, tokens=4096, step_seconds=0.2, data_wait_seconds=0.001)
        metrics.record_optimization(losses=losses, grad_norm=1.0, learning_rate=1e-4)

    print(f"update of a logged step   {median_microseconds(update):8.1f} us")
    print(
        f"scrape of all series      {median_microseconds(lambda: generate_latest(metrics.registry)):8.1f} us"
    )
    with tempfile.TemporaryDirectory() as folder, MetricsFile(Path(folder) / "metrics.jsonl") as file:
        print(f"line of the metrics file  {median_microseconds(lambda: file.write(record)):8.1f} us")


if __name__ == "__main__":
    main()
