"""Memory stages that are interrupted in the middle of conversations, and components that must not move."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import Result, run_ranks
from helpers.runs import (
    arguments,
    checkpoints,
    evaluations,
    metrics,
    relative,
    tensors,
    trainer_state,
    uninterrupted,
    untimed,
)

from rxt_dist.data.reader import Dataset

WRITE_STEPS, SMAT_STEPS = 5, 5
STEPS = WRITE_STEPS + SMAT_STEPS
SETTINGS: dict[str, Any] = {
    "batch.lanes": 4,
    "model.stm_init": "{distribution: standard, shared: false}",
    "model.memory_attention.gate.bias_init": 0.0,
    "optimizer.lr": 5e-3,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 100,
    "evaluation.max_conversations": 6,
    "stages": f"[{{name: memory_attention, steps: {WRITE_STEPS}, noise_level: 0.05, "
    f"label_weight_jitter: 0.15}}, {{name: smat, steps: {SMAT_STEPS}}}]",
}
SAVED = [2, 4, 5, 6, 8, 10]
INSIDE_WRITING, INSIDE_SMAT = 2, 8

Resume = Callable[..., Result]


@pytest.fixture(scope="module")
def whole(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """An uninterrupted run by number of ranks; all of its checkpoints were kept."""
    return {ranks: uninterrupted(datasets, tmp_path_factory, ranks, SETTINGS, SAVED) for ranks in (1, 2)}


@pytest.fixture
def resume(datasets: Datasets, tmp_path: Path) -> Resume:
    """Continue ``tmp_path/run``."""

    def call(ranks: int, **changes: Any) -> Result:
        settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
        return run_ranks(ranks, [*arguments(datasets, "run", settings), "--resume"], tmp_path)

    return call


def interrupted(whole: Path, folder: Path, step: int) -> Path:
    """A copy of ``whole`` in which the checkpoint of ``step`` is the newest."""
    run_dir = folder / "run"
    shutil.copytree(whole, run_dir)
    for number, path in checkpoints(run_dir).items():
        if number > step:
            shutil.rmtree(path)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    return run_dir


def memories(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: values for name, values in tensors(checkpoint).items() if name.startswith("stm.")}


@pytest.mark.parametrize("step", [INSIDE_WRITING, INSIDE_SMAT])
def test_the_interruptions_are_inside_conversations(
    whole: dict[int, Path], datasets: Datasets, step: int
) -> None:
    """Or the tests below would not notice a memory that is lost."""
    lanes = trainer_state(checkpoints(whole[1])[step])["data_state"]
    counts = Dataset(datasets.conversations, "train").interactions
    left = counts[lanes["conversations"]] - np.array(lanes["served"])
    assert (left > 0).any()
    assert all(values.abs().max() > 0 for values in memories(checkpoints(whole[1])[step]).values())


@pytest.mark.parametrize(
    ("ranks", "step"),
    [
        (1, INSIDE_SMAT),
        (2, INSIDE_WRITING),
        pytest.param(1, INSIDE_WRITING, marks=pytest.mark.slow),
        pytest.param(2, INSIDE_SMAT, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_inside_a_conversation_ends_bit_by_bit_like_an_uninterrupted_one(
    whole: dict[int, Path], resume: Resume, tmp_path: Path, ranks: int, step: int
) -> None:
    run_dir = interrupted(whole[ranks], tmp_path, step)
    assert f"from step {step}" in resume(ranks).check().output
    assert untimed(metrics(run_dir)) == untimed(metrics(whole[ranks]))
    assert untimed(evaluations(run_dir)) == untimed(evaluations(whole[ranks]))
    for saved in (number for number in SAVED if number > step):
        ours, theirs = checkpoints(run_dir)[saved], checkpoints(whole[ranks])[saved]
        assert trainer_state(ours) == trainer_state(theirs)
        found, expected = tensors(ours), tensors(theirs)
        assert found.keys() == expected.keys()
        assert [name for name, values in found.items() if not torch.equal(values, expected[name])] == []


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        pytest.param(1, 2, INSIDE_WRITING, marks=pytest.mark.slow),
        (2, 1, INSIDE_SMAT),
        (1, 4, INSIDE_SMAT),
    ],
)
def test_lanes_go_on_with_their_memory_on_another_mesh(
    whole: dict[int, Path], resume: Resume, tmp_path: Path, before: int, after: int, step: int
) -> None:
    run_dir = interrupted(whole[before], tmp_path, step)
    resume(after).check()
    ours, theirs = untimed(metrics(run_dir)), untimed(metrics(whole[before]))
    assert len(ours) == len(theirs) == STEPS
    for own, reference in zip(ours, theirs, strict=True):
        assert own.keys() == reference.keys()
        for key, value in reference.items():
            if isinstance(value, float):
                assert relative(own[key], value) <= 1e-5, (own["step"], key)
            else:
                assert own[key] == value
    found, expected = memories(checkpoints(run_dir)[STEPS]), memories(checkpoints(whole[before])[STEPS])
    assert list(found) == list(expected) == [f"stm.lane-{lane:06d}" for lane in range(4)]
    for name, values in found.items():
        assert (values - expected[name]).abs().max() <= 2e-4 * expected[name].abs().max(), name


def test_a_memory_that_was_lost_would_be_noticed(
    whole: dict[int, Path], resume: Resume, datasets: Datasets, tmp_path: Path
) -> None:
    """A new smat stage in place of a resumed one has fresh lanes: another loss in the first step."""
    state = trainer_state(checkpoints(whole[1])[INSIDE_SMAT])
    settings = SETTINGS | {"stages": "[{name: smat, steps: 5}]", "batch.lanes": 4}
    init = ["--init-from", str(checkpoints(whole[1])[INSIDE_SMAT])]
    run_ranks(1, [*arguments(datasets, "run", settings), *init], tmp_path).check()
    assert state["stage_step"] == INSIDE_SMAT - WRITE_STEPS
    fresh, reference = metrics(tmp_path / "run")[0], metrics(whole[1])[INSIDE_SMAT]
    assert relative(fresh["answer_loss"], reference["answer_loss"]) > 1e-4


LANE_CHANGES = {
    "lanes": ({"batch__lanes": 8}, "batch.lanes"),
    "window": ({"batch__window": 3}, "batch.window"),
}


@pytest.mark.parametrize("name", LANE_CHANGES)
def test_lanes_and_window_cannot_change_once_lanes_carry_memories(
    whole: dict[int, Path], resume: Resume, tmp_path: Path, name: str
) -> None:
    interrupted(whole[1], tmp_path, INSIDE_WRITING)
    changes, field = LANE_CHANGES[name]
    result = resume(1, **changes)
    assert result.codes == [2]
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert field in line
    assert "cannot change on --resume" in line
