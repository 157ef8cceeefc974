"""Launched runs with spread experts: resumed on other meshes, evaluated alone, started from other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import deepspeed
from helpers.mesh_runs import SAVED, SETTINGS, STEPS, assert_same_path, resumed
from helpers.runs import arguments, checkpoints, evaluations, metrics, tensors, uninterrupted, untimed

from rxt_dist.stages.expert_statistics import EXPERT_STATISTICS
from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

SPREAD = {"parallel.expert_size": 2}
WHOLE: dict[str, tuple[int, dict[str, Any]]] = {"1 rank": (1, {}), "2 expert ranks": (2, SPREAD)}


@pytest.fixture(scope="module")
def whole(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs with all of their checkpoints."""
    return {
        name: uninterrupted(datasets, tmp_path_factory, ranks, SETTINGS | own, SAVED)
        for name, (ranks, own) in WHOLE.items()
    }


def test_spread_experts_are_the_same_run(whole: dict[str, Path]) -> None:
    assert_same_path(whole["2 expert ranks"], whole["1 rank"])
    for record in metrics(whole["2 expert ranks"]):
        assert set(EXPERT_STATISTICS) <= record.keys()


@pytest.mark.parametrize(
    ("start", "step", "ranks", "own"),
    [
        ("2 expert ranks", 4, 1, {}),
        ("2 expert ranks", 8, 4, {"parallel.expert_size": 4, "zero.stage": 2}),
        ("1 rank", 8, 2, SPREAD),
        ("2 expert ranks", 5, 4, {"parallel.expert_size": 2}),
    ],
)
def test_a_run_goes_on_on_another_mesh(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, start: str, step: int, ranks: int, own: dict
) -> None:
    """Moments and counters too: the steps after the checkpoint are those of the uninterrupted run."""
    run_dir = resumed(datasets, tmp_path, whole[start], step, ranks, own)
    assert_same_path(run_dir, whole[start])


def test_a_run_resumed_on_its_own_mesh_ends_bit_by_bit_the_same(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = resumed(datasets, tmp_path, whole["2 expert ranks"], 8, 2, SPREAD)
    assert untimed(metrics(run_dir)) == untimed(metrics(whole["2 expert ranks"]))
    found, expected = (tensors(checkpoints(one)[STEPS]) for one in (run_dir, whole["2 expert ranks"]))
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_its_checkpoint_is_evaluated_in_one_process(whole: dict[str, Path]) -> None:
    for record in evaluations(whole["2 expert ranks"]):
        folder = checkpoints(whole["2 expert ranks"])[record["step"]]
        found = evaluate_checkpoint(folder)
        for name, value in found.items():
            if isinstance(value, float):
                assert value == pytest.approx(record[name], rel=1e-5), name


@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_starts_from_weights_of_another_mesh(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, frozen: bool
) -> None:
    """Under the deepspeed launcher; a frozen decoder is written back bit by bit, each expert once."""
    stage = "{name: smat, steps: 2" + (", frozen: [decoder]}" if frozen else "}")
    settings = SETTINGS | SPREAD | {"stages": f"[{stage}]", "optimizer.warmup_steps": 1}
    command = [*arguments(datasets, "new", settings), "--init-from", str(whole["1 rank"])]
    deepspeed(2, command, tmp_path).check()
    before = tensors(checkpoints(whole["1 rank"])[STEPS])
    after = tensors(checkpoints(tmp_path / "new")[2])
    names = [name for name in after if name.startswith("weight.decoder") and ".experts." in name]
    assert names
    assert all(torch.equal(after[name], before[name]) == frozen for name in names)
