"""The memory proof runs from nothing to its table, and a second start finds everything done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.launch import PROGRAM

from benchmarks import memory_proof
from data_prep.cli import main as rxt_data
from rxt_dist import demo

STEPS = [f"stages.{stage}.steps=2" for stage in range(3)]
WARMUPS = [f"stages.{stage}.optimizer.warmup_steps=0" for stage in range(3)]
SMALL = [*STEPS, *WARMUPS, "precision=fp32", "batch.lanes=8", "batch.packs=1", "checkpoint.keep_last=1"]
SIZES = ["--seeds", "3", "--conversations", "200", "--stories", "200", "--held-out", "16"]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], str]:
    """Start the benchmark in ``tmp_path/proof``; what it prints. Its data commands run in this process."""
    arguments = ["memory_proof.py", "--output", str(tmp_path / "proof"), *SIZES]
    arguments += [part for setting in SMALL for part in ("--set", setting)]

    def call() -> str:
        capsys.readouterr()
        assert memory_proof.main() == 0
        return capsys.readouterr().out

    def in_this_process(command: Sequence[str], environment: Mapping[str, str]) -> None:
        assert list(command[1:3]) == ["-m", "data_prep"]
        assert rxt_data(command[3:]) == 0

    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(demo, "_run", in_this_process)
    return call


def without_launcher(*arguments: Any) -> list[str]:
    """The command of the training for a single process."""
    command = demo.training_command(*arguments)
    return [sys.executable, *command[command.index(str(PROGRAM)) :]]


@pytest.mark.slow
def test_data_training_and_evaluation_and_nothing_twice(
    run: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "proof"
    table = run()
    record = json.loads((output / "results.json").read_text())["3"]
    assert list(record) == ["held-out", "longer", "overwritten", "one-kind"]
    counts = {name: len(values["by_interaction"]) for name, values in record.items()}
    assert counts["held-out"] <= 10 < 14 <= counts["longer"] <= 20
    for values in record.values():
        assert set(values["memory"]) == {"true", "fresh", "foreign"}
        assert all(memory["recall_by_distance"]["1"][1] > 0 for memory in values["memory"].values())
    for name in record:
        assert all(f"{name:<14}{memory:<9}" in table for memory in ("true", "fresh", "foreign"))
    metrics = (output / "seed-3" / "metrics.jsonl").read_text()
    data = {path: path.stat().st_mtime_ns for path in (output / "data").rglob("*")}
    monkeypatch.setattr(memory_proof, "training_command", without_launcher)
    assert run() != ""
    assert "finished already" in (output / "seed-3.log").read_text()
    assert {path: path.stat().st_mtime_ns for path in (output / "data").rglob("*")} == data
    assert (output / "seed-3" / "metrics.jsonl").read_text() == metrics
    assert json.loads((output / "results.json").read_text())["3"] == record
