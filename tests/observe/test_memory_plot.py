from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rxt_dist.observe.memory_plot import has_recall, plot_memory


def record(*, marks: bool, foreign: bool = True) -> dict[str, Any]:
    pairs = {"1": [3.0, 4.0], "12": [1.0, 4.0]} if marks else {}
    kind = {"recall_by_distance": pairs}
    memory = {"true": kind, "fresh": kind, "foreign": kind if foreign else None}

    def row(number: int, tokens: float) -> dict[str, Any]:
        values = {"answer_loss": 2.0 / number, "answer_accuracy": 0.5, "tokens": tokens}
        return {"interaction": number, **dict.fromkeys(memory, values)} | (
            {} if foreign else {"foreign": None}
        )

    return {"memory": memory, "by_interaction": [row(1, 9.0), row(2, 5.0), row(3, 0.0)]}


def test_has_recall() -> None:
    assert has_recall(record(marks=True)["memory"])
    assert has_recall(record(marks=True, foreign=False)["memory"])
    assert not has_recall(record(marks=False)["memory"])
    assert not has_recall(None)


def test_marks_make_one_panel_more(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    widths = []
    for name, marks in (("plain", False), ("marked", True)):
        (tmp_path / name).mkdir()
        path = plot_memory(tmp_path / name, record(marks=marks))
        assert path == tmp_path / name / "memory.png"
        widths.append(imread(path).shape[1])
    assert 2 * widths[1] == 3 * widths[0]


def test_lines_are_the_memories_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rxt_dist.observe import memory_plot

    class Axes:
        def __init__(self) -> None:
            self.lines: dict[str, list[list[float]]] = {}

        def plot(self, x: Any, y: Any, *, label: str, **_: Any) -> None:
            self.lines[label] = [list(x), list(y)]

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **options: None

    seen: list[Axes] = []

    def recorded(path: Path, panels: Any) -> Path:
        for draw in panels:
            seen.append(Axes())
            draw(seen[-1])
        return path

    monkeypatch.setattr(memory_plot, "draw_panels", recorded)
    plot_memory(tmp_path, record(marks=True, foreign=False))
    loss, accuracy, recall = (axes.lines for axes in seen)
    assert loss.keys() == accuracy.keys() == recall.keys() == {"true memory", "fresh memory"}
    assert loss["true memory"] == [[1, 2], [2.0, 1.0]], "an interaction without tokens has no point"
    assert recall["true memory"] == [[1, 12], [0.75, 0.25]]
