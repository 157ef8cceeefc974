"""Pictures of a memory evaluation: what the answers gain from the memory, and how far back it reaches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rxt_dist.observe.figures import Draw, draw_panels

MEMORY_FILE = "memory.png"

Record = dict[str, Any]


def plot_memory(folder: Path, record: Record) -> Path:
    """Draw ``folder/memory.png``: answer loss and accuracy by interaction with each memory, and recall by
    distance where tokens are marked.

    ``record`` is the evaluation of a memory; memories that are None are left out.

    Raises:
        DataError: matplotlib is not installed.
    """
    panels: list[Draw] = [
        partial(_draw_by_interaction, rows=record["by_interaction"], key=key, label=label)
        for key, label in (("answer_loss", "answer loss"), ("answer_accuracy", "answer accuracy"))
    ]
    if has_recall(record["memory"]):
        panels.append(partial(draw_recall, memory=record["memory"]))
    return draw_panels(folder / MEMORY_FILE, panels)


def has_recall(memory: Record | None) -> bool:
    """Whether the ``"memory"`` of an evaluation counted marked tokens."""
    return memory is not None and any(kind["recall_by_distance"] for kind in memory.values() if kind)


def draw_recall(axes: Any, memory: Record) -> None:
    """Share of marked tokens answered correctly, by distance, with each memory."""
    for name, kind in memory.items():
        if kind is None:
            continue
        pairs = {int(distance): pair for distance, pair in kind["recall_by_distance"].items()}
        distances = sorted(pairs)
        shares = [pairs[d][0] / pairs[d][1] for d in distances]
        axes.plot(distances, shares, marker="o", label=f"{name} memory")
    axes.set_title("recall")
    axes.set_xlabel("distance in interactions")
    axes.set_ylabel("marked tokens answered correctly")
    axes.set_ylim(0.0, 1.0)
    axes.legend(frameon=False)


def _draw_by_interaction(axes: Any, rows: list[Record], key: str, label: str) -> None:
    for name in ("true", "fresh", "foreign"):
        points = [(row["interaction"], row[name][key]) for row in rows if row[name] and row[name]["tokens"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{name} memory")
    axes.set_title(label)
    axes.set_xlabel("interaction of the conversation")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
