from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import speed_table
from benchmarks.speed_runs import CALLS, SHORTEST, Call, story_lengths
from benchmarks.speed_table import Outcome, header, row, run_calls, visible_gpus
from benchmarks.workload import read_config
from rxt_dist.config import check_world_size

SMALL = ("batch.micro_packs=2", "batch.packs=2", "batch.lanes=8", "stages=[{name: joint_lm, steps: 9}]")
OPTIONS = ("--steps", "2", "--warmup", "1")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_the_configuration_of_every_call_is_valid_on_one_gpu(call: Call) -> None:
    config, stages = read_config(call.config, [*call.overrides, "runtime.compile=true"], None)
    check_world_size(config, 1)
    assert stages == [0]
    assert not call.lengths or {int(length) for length in call.lengths} == {config.model.seq_len}
    if "W=" in call.name:
        assert call.name.endswith(f"W={config.batch.window}")


def test_names_are_unique() -> None:
    assert len({call.name for call in CALLS}) == len(CALLS)


def test_lengths_of_stories() -> None:
    lengths = story_lengths(256)
    assert (lengths == story_lengths(256)).all()
    assert (lengths.min(), lengths.max()) == (SHORTEST, 256)
    # Uncut, and their rests left out where they are short.
    rng = np.random.default_rng(0)
    documents = np.exp(rng.normal(np.log(200), 0.35, 4096)).astype(int)
    naive = [min(256, n - start) for n in documents.tolist() for start in range(0, n, 256)]
    assert sorted(lengths.tolist()) == sorted(length for length in naive if length >= SHORTEST)


def test_calls_run_until_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [
        Call("tiny joint", "tiny", SMALL, ("16", "16"), plain=True),
        Call("wrong", "tiny", ("batch.packs=0",), ("16", "16")),
        Call("stories", "tiny", SMALL),
    ]
    reported: list[Outcome] = []
    outcomes = run_calls(
        calls, OPTIONS, [""], tmp_path / "logs", seconds=100, most=90, report=reported.append
    )
    assert [outcome.call for outcome in outcomes] == calls
    assert reported == outcomes
    first, wrong, stories = outcomes
    assert wrong.found is None
    assert wrong.failure.startswith("exit code 2: ")
    assert "batch.packs" in wrong.failure
    assert first.found is not None
    assert stories.found is not None
    assert [result["engine"] for result in first.found["results"]] == ["deepspeed", "plain"]
    cells = dict(
        zip(header().replace(" ms", "").replace(" s", "").split(), row(first).split()[2:], strict=True)
    )
    result, plain = first.found["results"]
    assert float(cells["tok/step"]) == result["tokens_per_step"]
    assert cells["tax"] == f"{result['step_seconds'] / plain['step_seconds'] - 1:.1%}"
    assert (cells["ratio"], cells["busy"], cells["MFU"]) == ("-", "-", "-")
    assert row(wrong).endswith(wrong.failure)
    assert result["start_seconds"] > 0


def test_what_time_does_not_allow_is_left_out_or_ended(tmp_path: Path) -> None:
    calls = [Call("slow", "tiny", SMALL, ("16", "16")), Call("late", "tiny", SMALL, ("16", "16"))]
    slow, late = run_calls(calls, OPTIONS, [""], tmp_path, seconds=1.5, most=1.0, report=lambda outcome: None)
    assert slow.failure == "stopped after 1 s: no time"
    assert late.failure == "left out: no time"
    assert (slow.found, late.found) == (None, None)


def test_the_rate_is_compared_with_the_reference() -> None:
    result = {
        "engine": "deepspeed",
        "tokens_per_step": 100.0,
        "tokens_per_second": 3000.0,
        "reference": 1000,
        "step_seconds": 0.1,
        "busy_seconds": 0.05,
        "mfu": 0.2,
        "start_seconds": 7.0,
        "wait_seconds": 0.001,
        "peak_bytes": 1 << 31,
    }
    line = row(Outcome(CALLS[0], 12.0, {"results": [result]}))
    assert line.split()[2:] == [
        "100",
        "3,000",
        "3.00",
        "100.0",
        "50%",
        "-",
        "20.0%",
        "1.00",
        "2.0",
        "7",
        "12",
    ]


def test_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert visible_gpus() == ["0", "1", "2"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus() == [""]


def test_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed_table, "CALLS", (Call("a", "tiny", ()), Call("b", "tiny", ())))
    given: list[list[str]] = []

    def run_call(call: Call, options: list[str], *rest: object) -> Outcome:
        given.append(options)
        return Outcome(call, 1.0, None, "no reason")

    monkeypatch.setattr(speed_table, "run_call", run_call)
    file = tmp_path / "found.json"
    arguments = ["--only", "b", "--eager", "--set", "zero.stage=2", "--json", str(file)]
    assert speed_table.main(arguments) == 1
    assert "no reason" in capsys.readouterr().out
    assert json.loads(file.read_text()) == {"b": {"seconds": 1.0, "failure": "no reason", "found": None}}
    assert given == [
        ["--steps", "10", "--warmup", "5", "--set", "zero.stage=2", "--set", "runtime.compile=false"]
    ]
