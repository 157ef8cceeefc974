"""The program under the launchers that users start it with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.datasets import Datasets
from helpers.launch import PROGRAM, REPOSITORY, deepspeed, environment, free_port, run_ranks, shell
from helpers.runs import SMALL, arguments, checkpoints, evaluations, metrics, relative, tensors, untimed

SETTINGS = SMALL | {"stages": "[{name: joint_lm, steps: 3}]"}


@pytest.fixture(scope="module")
def forked(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two forked ranks, which all other tests of runs rely on."""
    folder = tmp_path_factory.mktemp("forked")
    run_ranks(2, arguments(datasets, "run", SETTINGS), folder).check()
    return folder / "run"


def assert_same_run(run_dir: Path, expected: Path) -> None:
    assert untimed(metrics(run_dir)) == untimed(metrics(expected))
    assert untimed(evaluations(run_dir)) == untimed(evaluations(expected))
    ours, theirs = tensors(checkpoints(run_dir)[3]), tensors(checkpoints(expected)[3])
    assert ours.keys() == theirs.keys()
    assert [name for name, values in ours.items() if not values.equal(theirs[name])] == []


def test_a_run_under_the_deepspeed_launcher(datasets: Datasets, forked: Path, tmp_path: Path) -> None:
    """It is bit by bit the run that forked ranks make."""
    deepspeed(2, arguments(datasets, "run", SETTINGS), tmp_path).check()
    assert_same_run(tmp_path / "run", forked)


@pytest.mark.slow
def test_a_mistake_under_the_deepspeed_launcher(datasets: Datasets, tmp_path: Path) -> None:
    """The launcher ends with our exit code, and the message is in its output."""
    settings = SETTINGS | {"batch.packs": 3}
    result = deepspeed(2, arguments(datasets, "run", settings), tmp_path)
    assert result.codes == [2], result.output
    message = "error: world size: found 2 ranks; the data-parallel size must divide batch.packs (3)"
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_process_without_launcher(datasets: Datasets, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), *arguments(datasets, "run", SETTINGS | {"optimizer.rate": 1})]
    result = shell(command, tmp_path)
    assert result.codes == [2], result.output
    (line,) = result.output.splitlines()
    assert line.startswith("error: ")
    assert "optimizer.rate: unknown key" in line


@pytest.mark.slow
def test_a_run_in_a_process_without_launcher(datasets: Datasets, tmp_path: Path) -> None:
    run_ranks(1, arguments(datasets, "expected", SETTINGS), tmp_path).check()
    shell([sys.executable, str(PROGRAM), *arguments(datasets, "run", SETTINGS)], tmp_path).check()
    assert_same_run(tmp_path / "run", tmp_path / "expected")


@pytest.mark.slow
def test_a_run_under_torchrun(datasets: Datasets, forked: Path, tmp_path: Path) -> None:
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "launch.train"]
    shell([*launcher, *arguments(datasets, tmp_path / "run", SETTINGS)], REPOSITORY).check()
    assert_same_run(tmp_path / "run", forked)


@pytest.mark.slow
def test_the_whole_run_file_on_four_ranks_under_the_launcher(datasets: Datasets, tmp_path: Path) -> None:
    """`tiny` as it is, with all of its stages, against a single process."""
    run_ranks(1, arguments(datasets, "one"), tmp_path).check()
    deepspeed(4, arguments(datasets, "four"), tmp_path).check()
    for ours, theirs in zip(metrics(tmp_path / "four"), metrics(tmp_path / "one"), strict=True):
        assert relative(ours["loss"], theirs["loss"]) <= 1e-5
        assert relative(ours["grad_norm"], theirs["grad_norm"]) <= 1e-5


@pytest.mark.slow
def test_a_dead_rank_ends_the_launch_and_the_run_resumes(
    datasets: Datasets, forked: Path, tmp_path: Path
) -> None:
    """The launcher takes the other rank down with it; nothing hangs."""
    settings = SETTINGS | {"stages": "[{name: joint_lm, steps: 60}]", "checkpoint.every_steps": 5}
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), str(PROGRAM)]
    command += arguments(datasets, tmp_path / "run", settings)
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            while process.poll() is None and not checkpoints(tmp_path / "run"):
                time.sleep(0.05)
            victims = [
                int(entry.name)
                for entry in Path("/proc").iterdir()
                if entry.name.isdigit() and is_rank_of(entry, tmp_path / "run")
            ]
            assert victims
            os.kill(max(victims), signal.SIGKILL)
            assert process.wait(60) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    done = max(checkpoints(tmp_path / "run"))
    assert 5 <= done < 60
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    resumed = [*arguments(datasets, tmp_path / "run", settings), "--resume"]
    result = run_ranks(2, resumed, tmp_path).check()
    assert f"from step {done}" in result.output
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 61))


def is_rank_of(process: Path, run_dir: Path) -> bool:
    """Whether a process is a rank of the run, rather than a launcher that has its arguments too."""
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    texts = [argument.decode(errors="replace") for argument in arguments]
    return any(str(run_dir) in text for text in texts) and any("--local_rank" in text for text in texts)
