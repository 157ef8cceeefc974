from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers.launch import free_port, python, shell

from benchmarks.host_time import parse_arguments
from benchmarks.stepping import PHASES

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ["joint_lm", "interaction_sft", "memory_attention", "smat"]


def host_time(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("benchmarks/host_time.py", *arguments)


def test_every_stage_and_both_engines() -> None:
    result = host_time(
        *("--config", "tiny", "--steps", "3", "--warmup", "1", "--without-deepspeed"),
        *("--set", "runtime.compile=false"),
    )
    assert result.returncode == 0, result.stderr
    title, _, header, *rows = result.stdout.splitlines()
    assert "rxt-tiny, attention hollow, ZeRO 1" in title
    assert header.split() == ["stage", "step", "longest", *PHASES]
    assert [row[:20].strip() for row in rows] == [
        name for stage in STAGES for name in (stage, "without DeepSpeed")
    ]
    for row in rows:
        step, longest, *phases = (float(cell) for cell in row[20:].split())
        assert 0 < step <= longest
        assert len(phases) == len(PHASES)
        assert all(seconds > 0 for seconds in phases[1:4])


@pytest.mark.slow
def test_ranks_share_experts(tmp_path: Path) -> None:
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    program = [str(REPOSITORY / "benchmarks" / "host_time.py"), "--config", "tiny", "--stage", "0"]
    settings = ["--set", "runtime.compile=false", "--set", "parallel.expert_size=2"]
    short = ["--steps", "2", "--warmup", "1"]
    result = shell([*launcher, *program, *short, *settings], tmp_path, 240)
    result.check()
    assert "ranks: 2;" in result.output
    assert result.output.count("\njoint_lm ") == 1


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--steps", "0"])
    assert "--steps must be 1 or more" in capsys.readouterr().err
    result = host_time("--config", "tiny", "--stage", "9")
    assert (result.returncode, "found 9; valid: 0 to 3" in result.stderr) == (2, True)
