from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from helpers.launch import python

STAGES = ["joint_lm", "interaction_sft", "memory_attention", "smat"]


def train_step(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("benchmarks/train_step.py", "--folder", str(folder), *arguments)


def test_every_stage_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    small = ("--set", "batch.micro_packs=2", "--set", "batch.micro_lanes=8")
    result = train_step(tmp_path, "--config", "tiny", "--steps", "2", "--warmup", "1", *small)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] in [[s] for s in STAGES]]
    assert [row[0] for row in rows] == STAGES
    for _, *cells in rows:
        tokens, rate, step, _, forward, backward, update, _, memory = (
            float(cell.replace(",", "")) for cell in cells
        )
        assert rate == pytest.approx(tokens / (step / 1e3), rel=0.01)
        assert 0 < forward < step
        assert 0 < backward < step
        assert 0 < update < step
        assert memory > 50
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "4"], r"--stage: found 4; valid: 0 to 3"),
        (["--set", "model.vocab_size=9"], r"model.vocab_size: found 9; valid here: 12 or more"),
        (["--lengths", "4", "9"], r"--lengths must be 8 or more"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = train_step(tmp_path, *arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
