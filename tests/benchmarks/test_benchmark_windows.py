from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from helpers.launch import python


def windows(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("benchmarks/windows.py", "--folder", str(folder), *arguments)


def test_memory_grows_with_the_window_and_recomputation_keeps_it_down(tmp_path: Path) -> None:
    small = ("--steps", "2", "--warmup", "1", "--set", "batch.lanes=8", "--lengths", "16", "16")
    result = windows(tmp_path, "--config", "tiny", "--windows", "1", "4", *small)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r" +\d", line)]
    assert [(row[0], row[1]) for row in rows] == [(w, r) for w in "14" for r in ("none", "interaction")]
    memory = {}
    for window, recompute, *cells in rows:
        tokens, rate, step, kept = (float(cell.replace(",", "")) for cell in cells)
        assert tokens == 16 * 8 * int(window)
        assert rate == pytest.approx(tokens / (step / 1e3), rel=0.01)
        memory[window, recompute] = kept
    assert memory["1", "interaction"] == memory["1", "none"]
    assert memory["4", "none"] > 3.5 * memory["1", "none"]
    assert memory["4", "interaction"] < 1.3 * memory["1", "none"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "0"], r"--stage: joint_lm has no windows"),
        (["--stage", "9"], r"--stage: found 9"),
        (["--windows", "0"], r"must be 1 or more"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = windows(tmp_path, *arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
