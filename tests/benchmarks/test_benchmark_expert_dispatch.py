from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launch import environment, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
COLUMNS = ["layer", "backward", "route", "sort", "permute", "counts", "send", "regroup", "experts", "return"]
EXCHANGE = ("counts", "send", "regroup", "return")


def dispatch(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [*launcher, "benchmarks/expert_dispatch.py", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False, timeout=180
    )


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_steps_of_a_layer_are_measured(ranks: int) -> None:
    small = ("--config", "tiny", "--tokens", "64", "512", "--repeats", "3", "--warmup", "1")
    result = dispatch(*small, "--set", f"parallel.expert_size={ranks}", ranks=ranks)
    assert result.returncode == 0, result.stderr
    header, *lines = (line.split() for line in result.stdout.splitlines() if line.lstrip()[:6] != "medians")
    while header[:1] != ["tokens"]:
        header, *lines = lines
    assert header == ["tokens", "uneven", *COLUMNS, "combine", "moved", "dispatch"]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row["tokens"] for row in rows] == ["64", "512"]
    for row in rows:
        seconds = {name: float(row[name]) for name in (*COLUMNS, "combine")}
        assert [name for name in seconds if not seconds[name]] == ([] if ranks > 1 else list(EXCHANGE))
        assert 1 <= float(row["uneven"]) <= 2
        moving = sum(seconds[name] for name in ("sort", "permute", *EXCHANGE))
        steps = sum(seconds[name] for name in seconds if name not in ("layer", "backward"))
        assert float(row["moved"].rstrip("%")) / 100 == pytest.approx(moving / steps, abs=0.02)
        ratio = (moving + seconds["combine"]) / seconds["experts"]
        assert float(row["dispatch"]) == pytest.approx(ratio, abs=0.02, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.decoder.moe=null"], r"^error: model\.decoder\.moe: found null"),
        (["--tokens", "0"], r"--tokens and --repeats must be 1 or more"),
        (["--set", "parallel.expert_size=2"], r"parallel\.expert_size"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    result = dispatch(*arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr, re.MULTILINE)
