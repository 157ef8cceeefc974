"""A picture of a run's losses, drawn from its metrics files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rxt_dist.errors import DataError
from rxt_dist.observe.figures import Draw, draw_panels
from rxt_dist.observe.memory_plot import draw_recall, has_recall
from rxt_dist.observe.metrics_file import EVALUATION_FILE, METRICS_FILE, read_metrics

CURVES_FILE = "curves.png"

Record = dict[str, Any]


def plot_curves(run_dir: Path, memory: Record | None = None) -> Path:
    """Draw ``run_dir/curves.png``: one panel a stage, its losses over steps, and the evaluations as dots.

    Reads ``metrics.jsonl`` and, if it exists, ``eval.jsonl``. Each record names its ``"stage"``; its
    losses are the numbers under the keys ``"loss"`` and ``"..._loss"``. A last panel shows recall by
    distance with each memory: of ``memory`` (the ``"memory"`` of an evaluation), or of the newest
    evaluation that has marked tokens.

    Returns:
        The path of the picture; an earlier one is replaced.

    Raises:
        DataError: there is no loss to draw, or matplotlib is not installed.
    """
    metrics = read_metrics(run_dir / METRICS_FILE)
    evaluations = read_metrics(run_dir / EVALUATION_FILE)
    stages = list(
        dict.fromkeys(record["stage"] for record in metrics if "stage" in record and _losses(record))
    )
    if not stages:
        raise DataError(
            f"{run_dir / METRICS_FILE}: no record of a training step with a loss, nothing to draw"
        )
    memory = memory or next((r["memory"] for r in reversed(evaluations) if has_recall(r.get("memory"))), None)
    panels: list[Draw] = [
        partial(_draw_stage, stage=stage, metrics=metrics, evaluations=evaluations) for stage in stages
    ]
    if memory is not None and has_recall(memory):
        panels.append(partial(draw_recall, memory=memory))
    return draw_panels(run_dir / CURVES_FILE, panels)


def _draw_stage(panel: Any, stage: str, metrics: Sequence[Record], evaluations: Sequence[Record]) -> None:
    trained = _series(record for record in metrics if record.get("stage") == stage)
    evaluated = _series(record for record in evaluations if record.get("stage") == stage)
    for number, name in enumerate(dict.fromkeys([*trained, *evaluated])):
        color = f"C{number}"
        if name in trained:
            panel.plot(*trained[name], color=color, label=name)
        if name in evaluated:
            # The colour tells which loss it is; only a loss that has no line needs a name of its own.
            label = None if name in trained else name
            panel.plot(*evaluated[name], color=color, marker="o", linestyle="none", label=label)
    panel.set_title(stage)
    panel.set_xlabel("step (lines: training, dots: evaluation)")
    panel.set_ylabel("loss")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _series(records: Iterable[Record]) -> dict[str, tuple[list[int], list[float]]]:
    """Loss name -> (steps, losses); a non-finite loss leaves a gap in the line."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, loss in _losses(record).items():
            steps, losses = series.setdefault(name, ([], []))
            steps.append(record["step"])
            losses.append(loss)
    return series


def _losses(record: Record) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if (name == "loss" or name.endswith("_loss")) and isinstance(value, (int, float, str))
    }
