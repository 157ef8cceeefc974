"""Resuming: what was interrupted ends exactly as if it had not been."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import flip_bit
from helpers.datasets import Datasets
from helpers.launch import Result, run_ranks, start_ranks
from helpers.runs import (
    SMALL,
    arguments,
    checkpoints,
    evaluations,
    metrics,
    relative,
    tensors,
    trainer_state,
    tree,
    uninterrupted,
    untimed,
)

STAGE_STEPS = 5
STEPS = 2 * STAGE_STEPS
SETTINGS: dict[str, Any] = SMALL | {
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 100,
    "batch.micro_packs": 2,
    "stages.0.noise_level": 0.05,
    "stages.1.slot_dropout": 0.2,
}
SAVED = [2, 4, 5, 6, 8, 10]

Resume = Callable[..., Result]


@pytest.fixture(scope="module")
def whole(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """An uninterrupted run by number of ranks; all of its checkpoints were kept."""
    return {ranks: uninterrupted(datasets, tmp_path_factory, ranks, SETTINGS, SAVED) for ranks in (1, 2)}


@pytest.fixture
def resume(datasets: Datasets, tmp_path: Path) -> Resume:
    """Continue ``tmp_path/run``."""

    def call(ranks: int = 1, settings: dict[str, Any] = SETTINGS) -> Result:
        return run_ranks(ranks, [*arguments(datasets, "run", settings), "--resume"], tmp_path)

    return call


def interrupted(whole: Path, folder: Path, step: int) -> Path:
    """A copy of ``whole`` as a crash leaves it when the newest checkpoint is the one of ``step``.

    Steps after it were logged and perhaps evaluated, the next checkpoint was being written, and the last
    line of the metrics is torn.
    """
    run_dir = folder / "run"
    shutil.copytree(whole, run_dir)
    for number, path in checkpoints(run_dir).items():
        if number > step:
            path.rename(path.with_name(path.name + ".tmp"))
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"step":11,"stage":"interaction_sft","loss":9.2')
    return run_dir


def with_stages(stages: str) -> dict[str, Any]:
    """The settings of the run with other stages; the first keeps its noise."""
    kept = {key: value for key, value in SETTINGS.items() if not key.startswith("stages.1")}
    return kept | {"stages": stages}


def assert_same_end(run_dir: Path, whole: Path) -> None:
    """Weights and moments bit by bit, every record, and the whole state of the trainer."""
    assert untimed(metrics(run_dir)) == untimed(metrics(whole))
    assert untimed(evaluations(run_dir)) == untimed(evaluations(whole))
    ours, theirs = checkpoints(run_dir)[STEPS], checkpoints(whole)[STEPS]
    assert trainer_state(ours) == trainer_state(theirs)
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    different = [name for name, values in found.items() if not torch.equal(values, expected[name])]
    assert different == []


@pytest.mark.parametrize(
    ("ranks", "step"),
    [
        (1, 2),
        (2, 5),
        (2, 8),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1, 5), (1, 6), (2, 4))),
    ],
)
def test_a_resumed_run_ends_bit_by_bit_like_an_uninterrupted_one(
    whole: dict[int, Path], resume: Resume, tmp_path: Path, ranks: int, step: int
) -> None:
    run_dir = interrupted(whole[ranks], tmp_path, step)
    result = resume(ranks).check()
    assert f"from step {step}" in result.output
    assert_same_end(run_dir, whole[ranks])
    assert list(checkpoints(run_dir)) == SAVED
    assert list((run_dir / "checkpoints").glob("*.tmp")) == []


def test_an_interruption_between_last_checkpoint_and_evaluation(
    whole: dict[int, Path], resume: Resume, tmp_path: Path
) -> None:
    """At the end of a stage only the evaluation is left to do."""
    run_dir = interrupted(whole[1], tmp_path, STAGE_STEPS)
    (run_dir / "eval.jsonl").write_text("")
    resume().check()
    assert_same_end(run_dir, whole[1])


def test_resuming_a_finished_run_changes_nothing(
    whole: dict[int, Path], resume: Resume, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole[2], run_dir)
    before = tree(run_dir)
    result = resume(2).check()
    assert "finished already" in result.output
    assert tree(run_dir) == before


@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [
        pytest.param(1, 2, {}, marks=pytest.mark.slow),
        (2, 1, {}),
        (1, 4, {"batch.micro_packs": "auto"}),
        (2, 2, {"zero.stage": 2, "batch.micro_packs": 1}),
    ],
    ids=["1 to 2 ranks", "2 to 1 rank", "1 to 4 ranks", "ZeRO 1 to 2"],
)
def test_a_run_goes_on_along_the_same_path_on_another_mesh(
    whole: dict[int, Path], resume: Resume, tmp_path: Path, before: int, after: int, settings: dict[str, Any]
) -> None:
    run_dir = interrupted(whole[before], tmp_path, 2)
    resume(after, SETTINGS | settings).check()
    ours, theirs = metrics(run_dir), metrics(whole[before])
    for own, reference in zip(ours, theirs, strict=True):
        for key in ("step", "stage", "lr", "tokens", "total_tokens"):
            assert own[key] == reference[key]
        for key in ("loss", "mlm_loss", "ar_loss", "aux_loss", "grad_norm"):
            assert relative(own[key], reference[key]) <= 1e-5, (own["step"], key)
    found = tensors(checkpoints(run_dir)[STEPS])
    expected = tensors(checkpoints(whole[before])[STEPS])
    for name, values in found.items():
        assert (values - expected[name]).abs().max() <= 2e-4 * expected[name].abs().max(), name


def test_lines_after_the_checkpoint_are_cut_off_before_they_are_written_again(
    whole: dict[int, Path], resume: Resume, tmp_path: Path
) -> None:
    """Lines of a future that never happens must not survive, even if the resumed run is shorter."""
    run_dir = interrupted(whole[1], tmp_path, 4)
    false_line = json.dumps({"step": 9, "stage": "from another future", "loss": 0.0})
    for name in ("metrics.jsonl", "eval.jsonl"):
        file = run_dir / name
        file.write_text(f"{false_line}\n{file.read_text()}")
    resume(settings=with_stages("[{name: joint_lm, steps: 5}]")).check()
    assert untimed(metrics(run_dir)) == untimed(metrics(whole[1])[:STAGE_STEPS])
    assert untimed(evaluations(run_dir)) == untimed(evaluations(whole[1])[:1])


def test_stages_can_be_added_to_a_finished_run(
    whole: dict[int, Path], resume: Resume, tmp_path: Path
) -> None:
    """And the run that they make is resumed like any other."""
    shutil.copytree(whole[1], tmp_path / "run")
    added = with_stages(
        "[{name: joint_lm, steps: 5}, {name: interaction_sft, steps: 5, slot_dropout: 0.2}, "
        "{name: joint_lm, steps: 4}]"
    )
    resume(settings=added).check()
    longer = tmp_path / "longer"
    shutil.move(tmp_path / "run", longer)
    assert [record["step"] for record in metrics(longer)] == list(range(1, 15))
    assert untimed(metrics(longer)[:STEPS]) == untimed(metrics(whole[1]))
    assert [record["stage_index"] for record in evaluations(longer)] == [0, 1, 2]

    interrupted(longer, tmp_path, 12)
    resume(settings=added).check()
    assert untimed(metrics(tmp_path / "run")) == untimed(metrics(longer))


@pytest.mark.parametrize(
    "file",
    [
        "tensors/__0_0.distcp",
        "manifest.json",
        # That damage of every file is noticed is tested without a run as well.
        pytest.param("tensors/.metadata", marks=pytest.mark.slow),
        pytest.param("trainer.json", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    whole: dict[int, Path], resume: Resume, tmp_path: Path, file: str
) -> None:
    run_dir = interrupted(whole[1], tmp_path, 8)
    damaged = checkpoints(run_dir)[8]
    flip_bit(damaged / file)
    result = resume().check()
    assert f"{damaged.name} is damaged" in result.output
    assert file in result.output
    assert "from step 6" in result.output
    assert_same_end(run_dir, whole[1])


def test_all_checkpoints_damaged(whole: dict[int, Path], resume: Resume, tmp_path: Path) -> None:
    run_dir = interrupted(whole[1], tmp_path, 4)
    for path in checkpoints(run_dir).values():
        flip_bit(path / "tensors" / "__0_0.distcp")
    before = tree(run_dir)
    result = resume()
    assert result.codes == [2]
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert "all 2 checkpoints are damaged" in line
    assert "Traceback" not in result.output
    assert tree(run_dir) == before


def test_nothing_to_resume_starts_from_the_beginning(
    whole: dict[int, Path], resume: Resume, tmp_path: Path
) -> None:
    result = resume().check()
    assert "nothing to resume" in result.output
    assert_same_end(tmp_path / "run", whole[1])


def test_a_run_interrupted_before_its_first_checkpoint_starts_anew(
    whole: dict[int, Path], resume: Resume, tmp_path: Path
) -> None:
    run_dir = interrupted(whole[1], tmp_path, 0)
    resume().check()
    assert_same_end(run_dir, whole[1])


def test_a_killed_run_resumes(datasets: Datasets, tmp_path: Path) -> None:
    """SIGKILL of all ranks at two random moments, between checkpoints or while one is written."""
    settings = SETTINGS | {"stages.0.steps": 16, "checkpoint.every_steps": 4}
    run_ranks(2, arguments(datasets, "run", settings), tmp_path / "whole").check()
    chance = random.Random(time.time_ns())
    run_dir = tmp_path / "run"

    def command(resume: bool) -> list[str]:
        return [*arguments(datasets, run_dir, settings), *(["--resume"] if resume else [])]

    kills = []
    for attempt in range(2):
        with start_ranks(2, command(attempt > 0), tmp_path) as ranks:
            seen = newest(run_dir)
            while ranks.alive() and newest(run_dir) == seen:
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.25))
            if ranks.alive():
                kills.append(newest(run_dir))
    print("killed after checkpoints", kills)
    assert kills, "the run ended before it could be killed"
    run_ranks(2, command(True), tmp_path).check()
    whole = tmp_path / "whole" / "run"
    assert untimed(metrics(run_dir)) == untimed(metrics(whole))
    found, expected = tensors(checkpoints(run_dir)[21]), tensors(checkpoints(whole)[21])
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


def newest(run_dir: Path) -> int:
    return max(checkpoints(run_dir), default=0)
