from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from rxt_dist.errors import DataError
from rxt_dist.observe.curves import _series, plot_curves
from rxt_dist.observe.metrics_file import MetricsFile


def write_run(run_dir: Path, stages: tuple[str, ...] = ("joint_lm", "interaction_sft")) -> None:
    step = 0
    with MetricsFile(run_dir / "metrics.jsonl") as metrics, MetricsFile(run_dir / "eval.jsonl") as evaluation:
        for stage in stages:
            for _ in range(20):
                step += 1
                loss = math.nan if step == 5 else 8.0 / step
                metrics.write({"step": step, "stage": stage, "loss": loss, "masked_loss": loss / 2})
            evaluation.write({"step": step, "stage": stage, "loss": 1.0, "accuracy": 0.5})


def test_draws_one_panel_a_stage(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    sizes = {}
    for stages in [("joint_lm",), ("joint_lm", "interaction_sft")]:
        run_dir = tmp_path / str(len(stages))
        write_run(run_dir, stages)
        path = plot_curves(run_dir)
        assert path == run_dir / "curves.png"
        picture = imread(path)
        sizes[len(stages)] = picture.shape
        assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[-1])}) > 10
    assert sizes[2][1] == 2 * sizes[1][1]


def test_works_without_evaluations_and_replaces_an_older_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_run(tmp_path)
    (tmp_path / "eval.jsonl").unlink()
    (tmp_path / "curves.png").write_bytes(b"old")
    assert plot_curves(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_only_losses_become_curves_and_non_finite_ones_are_gaps() -> None:
    records = [
        {"step": 1, "stage": "a", "loss": 2, "accuracy": 0.5, "glossy": 1.0},
        {"step": 2, "stage": "a", "loss": "nan", "next_loss": 1.5},
    ]
    series = _series(records)
    assert series.keys() == {"loss", "next_loss"}
    assert series["loss"][0] == [1, 2]
    assert series["loss"][1][0] == 2.0
    assert math.isnan(series["loss"][1][1])


@pytest.mark.parametrize("content", [None, b"", b'{"step":1,"stage":"a","accuracy":0.5}\n'])
def test_nothing_to_draw_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl.*nothing to draw"):
        plot_curves(tmp_path)


def test_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"rxt-dist\[monitoring\]"):
        plot_curves(tmp_path)


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, rxt_dist.observe.curves; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
