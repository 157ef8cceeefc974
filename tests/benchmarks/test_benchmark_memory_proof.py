"""The memory proof runs from nothing to its table, and a second start finds everything done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = [f"stages.{stage}.steps=2" for stage in range(3)]
WARMUPS = [f"stages.{stage}.optimizer.warmup_steps=0" for stage in range(3)]
SMALL = [*STEPS, *WARMUPS, "precision=fp32", "batch.lanes=8", "batch.packs=1", "checkpoint.keep_last=1"]


def run(output: Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_proof.py"), "--output", str(output)]
    command += ["--seeds", "3", "--conversations", "200", "--held-out", "40"]
    command += [part for setting in SMALL for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_data_training_and_evaluation_and_nothing_twice(tmp_path: Path) -> None:
    output = tmp_path / "proof"
    table = run(output)
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
    assert run(output) != ""
    assert (output / "seed-3" / "metrics.jsonl").read_text() == metrics
    assert json.loads((output / "results.json").read_text())["3"] == record
