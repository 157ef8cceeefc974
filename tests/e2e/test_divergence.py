"""A run whose loss is no number any more."""

from __future__ import annotations

from pathlib import Path

from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, checkpoints, metrics


def test_a_diverged_run_ends_on_all_ranks(datasets: Datasets, tmp_path: Path) -> None:
    """With a message, the bad step on record, and no checkpoint of it."""
    settings = SMALL | {"optimizer.lr": 1e30, "optimizer.warmup_steps": 0, "checkpoint.every_steps": 2}
    result = run_ranks(2, arguments(datasets, "run", settings), tmp_path)
    assert result.codes == [1, 1]
    assert "the loss is nan at step 2 (stage joint_lm); lower the learning rate" in result.output
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["loss"] == "nan"
    assert checkpoints(tmp_path / "run") == {}


def test_a_diverged_step_is_not_saved_though_it_is_not_logged(datasets: Datasets, tmp_path: Path) -> None:
    settings = SMALL | {"optimizer.lr": 1e30, "optimizer.warmup_steps": 0, "checkpoint.every_steps": 2}
    settings |= {"metrics.log_every_steps": 100}
    result = run_ranks(1, arguments(datasets, "run", settings), tmp_path)
    assert result.codes == [1]
    assert "the loss is nan at step 2 (stage joint_lm); lower the learning rate" in result.output
    assert checkpoints(tmp_path / "run") == {}
