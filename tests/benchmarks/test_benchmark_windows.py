from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.engines import join_deepspeed
from helpers.launch import python, run_function

from rxt_dist.config import DataConfig
from rxt_dist.parallel.bootstrap import World

REPOSITORY = Path(__file__).resolve().parents[2]


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


def keep(folder: Path) -> None:
    """On every rank: the bytes that a window's graph keeps, without and with spread experts."""
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.windows import kept_bytes, parse_arguments
    from benchmarks.workload import read_config, write_datasets

    join_deepspeed()
    rank, kept = torch.distributed.get_rank(), []
    for size in (1, 2):
        arguments = parse_arguments(["--lengths", "16", "16"])
        settings = ["batch.lanes=8", f"parallel.expert_size={size}"]
        config, stages = read_config("tiny", settings, None)
        source = folder / f"{rank}-{size}"
        write_datasets(source, config, stages, 4, arguments)
        data = DataConfig(text=source / "text", conversations=source / "conversations")
        world = World(rank, rank, 2, torch.device("cpu"))
        kept.append(kept_bytes(config.model_copy(update={"data": data}), stages[-1], world))
    (folder / f"{rank}.json").write_text(json.dumps(kept))


def test_with_spread_experts_a_rank_keeps_the_rows_that_came_to_it(tmp_path: Path) -> None:
    assert run_function(2, keep, tmp_path) == [0, 0]
    (first, spread), (second, also_spread) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)
    )
    assert spread != first
    assert also_spread != second


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
