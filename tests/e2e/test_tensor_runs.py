"""Launched runs whose ranks share tensors: the same as on one rank, resumed elsewhere, evaluated alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import deepspeed
from helpers.mesh_runs import SAVED, SETTINGS, STEPS, assert_same_path, resumed
from helpers.runs import arguments, checkpoints, evaluations, metrics, tensors, uninterrupted, untimed

from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

SHARED: dict[str, Any] = {"parallel.tensor_size": 2, "zero.stage": 2}
DIVIDED: dict[str, Any] = {"parallel.tensor_size": 2, "parallel.sequence_parallel": True}
WHOLE: dict[str, tuple[int, dict[str, Any]]] = {"1 rank": (1, {}), "4 ranks": (4, SHARED)}


@pytest.fixture(scope="module")
def whole(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs with all of their checkpoints."""
    return {
        name: uninterrupted(datasets, tmp_path_factory, ranks, SETTINGS | own, SAVED)
        for name, (ranks, own) in WHOLE.items()
    }


def test_shared_tensors_are_the_same_run(whole: dict[str, Path]) -> None:
    """Losses, statistics, weights, moments, what lanes carry, samples and evaluations."""
    assert_same_path(whole["4 ranks"], whole["1 rank"])
    assert_same_evaluations(whole["4 ranks"], whole["1 rank"])


def assert_same_evaluations(ours: Path, theirs: Path) -> None:
    for own, reference in zip(*(untimed(evaluations(run)) for run in (ours, theirs)), strict=True):
        assert own.keys() == reference.keys()
        assert own.get("samples") == reference.get("samples")
        for name, value in reference.items():
            if isinstance(value, float):
                assert own[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    ("start", "step", "ranks", "own"),
    [
        ("4 ranks", 8, 1, {}),
        ("1 rank", 4, 2, {"parallel.tensor_size": 2, "parallel.expert_size": 2}),
        ("4 ranks", 2, 2, DIVIDED),
        pytest.param("4 ranks", 2, 4, DIVIDED | {"parallel.expert_size": 2}, marks=pytest.mark.slow),
        pytest.param(
            "4 ranks",
            4,
            4,
            {"parallel.tensor_size": 4, "parallel.expert_size": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_on_another_mesh(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, start: str, step: int, ranks: int, own: dict
) -> None:
    """Moments and counters too: the steps after the checkpoint are those of the uninterrupted run."""
    run_dir = resumed(datasets, tmp_path, whole[start], step, ranks, own)
    assert_same_path(run_dir, whole[start])
    assert_same_evaluations(run_dir, whole[start])


@pytest.mark.slow
def test_a_run_resumed_on_its_own_mesh_ends_bit_by_bit_the_same(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = resumed(datasets, tmp_path, whole["4 ranks"], 8, 4, SHARED)
    assert untimed(metrics(run_dir)) == untimed(metrics(whole["4 ranks"]))
    found, expected = (tensors(checkpoints(one)[STEPS]) for one in (run_dir, whole["4 ranks"]))
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_its_checkpoint_is_evaluated_in_one_process(whole: dict[str, Path]) -> None:
    for record in evaluations(whole["4 ranks"]):
        found = evaluate_checkpoint(checkpoints(whole["4 ranks"])[record["step"]])
        for name, value in found.items():
            if isinstance(value, float):
                assert value == pytest.approx(record[name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2])
def test_frozen_weights_of_another_mesh_come_back_bit_by_bit(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, experts: int
) -> None:
    """Under the deepspeed launcher; each element of a shared, spread or copied tensor once."""
    stages = "[{name: smat, steps: 2, frozen: [decoder]}]"
    own = {"parallel.tensor_size": 2, "parallel.expert_size": experts, "stages": stages}
    settings = SETTINGS | own | {"optimizer.warmup_steps": 1}
    command = [*arguments(datasets, "new", settings), "--init-from", str(whole["1 rank"])]
    deepspeed(2, command, tmp_path).check()
    before, after = (
        tensors(checkpoints(run)[n]) for run, n in ((whole["1 rank"], STEPS), (tmp_path / "new", 2))
    )
    names = {name for name in before if name.startswith(("weight.decoder", "weight.mlm_head"))}
    assert names <= after.keys()
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert not torch.equal(
        after["weight.encoder.layers.0.attention.q.weight"],
        before["weight.encoder.layers.0.attention.q.weight"],
    )
