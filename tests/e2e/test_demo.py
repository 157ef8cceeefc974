"""The demonstration at a size that shows nothing: what it checks, what it leaves, how it continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.launch import REPOSITORY
from helpers.runs import checkpoints, evaluations, metrics, read_lines

from data_prep.cli import main as rxt_data
from rxt_dist import cli, demo
from rxt_dist.demo import Bounds, check, run_demo
from rxt_dist.errors import RxtError, TrainingError

STAGES = ("joint_lm", "interaction_sft", "memory_attention", "smat")
RUN = """
extends: demo
batch: {lanes: 8, packs: 2, pack_tokens: 128, window: 2}
stages:
  - {name: joint_lm, steps: 2}
  - {name: interaction_sft, steps: 2}
  - {name: memory_attention, steps: 2}
  - {name: smat, steps: 3}
metrics: {log_every_steps: 1, prometheus: {enabled: false}}
evaluation: {max_packs: 2, samples: 1, sample_tokens: 2}
"""
CHECKPOINT_SECONDS = 90.0


def memory(recall: float, count: int, distances: Sequence[int] = (1, 2, 3)) -> dict[str, Any]:
    pairs = {str(d): [recall * count / len(distances), count / len(distances)] for d in distances}
    return {"answer_loss": 0.5, "answer_accuracy": 0.9, "tokens": 900.0, "recall": recall,
            "recall_by_distance": pairs}  # fmt: skip


def record(true: float = 0.95, fresh: float = 0.12, foreign: float = 0.1, count: int = 600) -> dict[str, Any]:
    values = {"true": true, "fresh": fresh, "foreign": foreign}
    return {"memory": {name: memory(recall, count) for name, recall in values.items()}}


class TestCheck:
    def test_a_memory_that_works(self) -> None:
        assert check(record(), Bounds()) == []
        assert check(record(true=0.80, fresh=0.20, foreign=0.20, count=300), Bounds()) == []

    @pytest.mark.parametrize(
        ("values", "name", "found", "bound"),
        [
            ({"true": 0.79}, "true", "79.0%", "at least 80%"),
            ({"fresh": 0.21}, "fresh", "21.0%", "at most 20%"),
            ({"foreign": 0.5}, "foreign", "50.0%", "at most 20%"),
        ],
    )
    def test_a_recall_out_of_bounds(
        self, values: dict[str, float], name: str, found: str, bound: str
    ) -> None:
        (problem,) = check(record(**values), Bounds())
        assert problem.startswith("recall with ")
        for part in (name, found, bound):
            assert part in problem

    def test_every_problem_is_named(self) -> None:
        assert len(check(record(true=0.1, fresh=0.9, foreign=0.9), Bounds())) == 3

    def test_too_few_marked_tokens(self) -> None:
        """Said once, as all memories are asked for the same."""
        (problem,) = check(record(count=299), Bounds())
        assert problem == "only 299 marked tokens were asked for; 300 are needed"
        assert check({"memory": {"true": memory(1.0, 0, ())}}, Bounds())

    def test_farther_distances_do_not_count(self) -> None:
        """They neither save a weak recall nor spoil a good one."""
        far = record(true=0.2)
        far["memory"]["true"]["recall_by_distance"]["4"] = [10_000, 10_000]
        assert check(far, Bounds())
        near = record()
        near["memory"]["true"]["recall_by_distance"]["4"] = [0, 10_000]
        near["memory"]["foreign"]["recall_by_distance"]["5"] = [10_000, 10_000]
        assert check(near, Bounds()) == []
        assert check(near, Bounds(distances=4))

    def test_bounds_are_parameters(self) -> None:
        weak = record(true=0.3, fresh=0.25, count=30)
        assert check(weak, Bounds(marked=30, least_true=0.3, most_other=0.25)) == []


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demonstration with a small corpus and few steps; its folder."""
    file = tmp_path / "small.yaml"
    file.write_text(RUN)
    for name, value in {
        "RUN_FILE": str(file),
        "_CONVERSATIONS": 60,
        "_STORIES": 40,
        "_HELD_OUT": 40,
        "_VOCABULARY": 320,
    }.items():
        monkeypatch.setattr(demo, name, value)
    # The demonstration is installed with the package; here its programs are found in the source tree.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path / "demo"


def is_training(command: Sequence[str]) -> bool:
    return any("train.py" in part for part in command)


def run_until_checkpoint(folder: Path) -> Callable[[Sequence[str], Mapping[str, str]], None]:
    """In place of running the training to its end: kill all of it once its first checkpoint is there."""

    def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
        process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        try:
            deadline = time.monotonic() + CHECKPOINT_SECONDS
            while not checkpoints(folder / "run") and process.poll() is None:
                assert time.monotonic() < deadline, "no checkpoint in time"
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise KeyboardInterrupt

    return run


@pytest.mark.slow
def test_an_interrupted_demonstration_goes_on_and_says_what_it_lacks(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed after its first checkpoint; started again it trains on, evaluates, draws, and then fails."""
    plain, commands = demo._run, []
    interrupt = run_until_checkpoint(small)

    def first(command: Sequence[str], environment: Any) -> None:
        if is_training(command):
            interrupt(command, environment)
        assert rxt_data(command[3:]) == 0

    monkeypatch.setattr(demo, "_run", first)
    with pytest.raises(KeyboardInterrupt):
        run_demo(small)
    reached = max(checkpoints(small / "run"))
    assert reached < 9, "the training ended before it was killed"
    data = {path: path.stat().st_mtime_ns for path in (small / "data").rglob("*") if path.is_file()}

    def second(command: Sequence[str], environment: Any) -> None:
        commands.append(list(command))
        plain(command, environment)

    monkeypatch.setattr(demo, "_run", second)
    with pytest.raises(TrainingError) as caught:
        run_demo(small, Bounds(marked=10, least_true=1.01))
    (training,) = commands
    assert is_training(training)
    assert training[-1] == "--resume"
    assert {p: p.stat().st_mtime_ns for p in (small / "data").rglob("*") if p.is_file()} == data

    report = str(caught.value)
    assert "recall with the true memory is" in report
    assert "at least 101% expected" in report
    run = small / "run"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    held_out = json.loads((run / "held_out.json").read_text())
    assert (held_out["stage"], held_out["split"], held_out["step"]) == ("smat", "train", 9)
    assert set(held_out["memory"]) == {"true", "fresh", "foreign"}
    assert [entry["stage"] for entry in evaluations(run)] == list(STAGES)
    assert [entry["step"] for entry in metrics(run)] == list(range(1, 10))
    for stage in STAGES:
        assert stage in report
    assert "marked" in report
    assert f"from step {reached}" in capfd.readouterr().err

    # Nothing is left to do; bounds that it meets make the same folder a success.
    monkeypatch.setattr(demo, "_train", lambda *_: None)
    report = run_demo(small, Bounds(marked=10, least_true=0.0, most_other=1.0))
    assert str(run / "curves.png") in report
    assert "127.0.0.1" in report


def test_held_out_conversations_are_not_those_of_the_training(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_HELD_OUT", 60)
    monkeypatch.setattr(demo, "_run", lambda command, _: generate(command))
    demo._prepare_data(small)
    ours, theirs = (
        {json.dumps(entry["interactions"]) for entry in read_lines(small / name / "conversations.jsonl")}
        for name in ("raw", "raw_held_out")
    )
    assert len(ours) == len(theirs) == 60
    assert ours.isdisjoint(theirs)


def generate(command: Sequence[str]) -> None:
    """Run only the commands that write the corpora, in this process."""
    if command[3] == "synth":
        assert rxt_data(command[3:]) == 0


@pytest.mark.parametrize(("code", "error"), [(2, RxtError), (1, TrainingError), (-9, TrainingError)])
def test_a_program_that_fails_ends_the_demonstration(code: int, error: type[Exception]) -> None:
    program = f"import os, signal, sys; os.kill(os.getpid(), 9) if {code} < 0 else sys.exit({code})"
    with pytest.raises(error):
        demo._run([sys.executable, "-c", program], os.environ)
    demo._run([sys.executable, "-c", ""], os.environ)


def test_the_command_returns_what_the_demonstration_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = []

    def shown(folder: Path) -> str:
        folders.append(folder)
        return "a table"

    def failed(folder: Path) -> str:
        raise TrainingError("a table\n\nrecall is low")

    monkeypatch.setattr(demo, "run_demo", shown)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "a table\n"
    assert folders == [tmp_path]
    monkeypatch.setattr(demo, "run_demo", failed)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "a table\n\nrecall is low\n"
