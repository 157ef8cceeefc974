"""Runs of stage context_sft: the same on any mesh, and resumed inside the stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.mesh_runs import SETTINGS
from helpers.runs import arguments, checkpoints, evaluations, metrics, relative, uninterrupted, untimed

CONTEXT: dict[str, Any] = SETTINGS | {"stages": "[{name: context_sft, steps: 4, window: 3}]"}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks that share tensors": (2, {"parallel.tensor_size": 2}),
    "2 ranks that divide tokens": (2, {"parallel.tensor_size": 2, "parallel.sequence_parallel": True}),
    "2 ranks with spread experts": (2, {"parallel.expert_size": 2, "zero.stage": 2}),
    "2 ranks with cut weights": (2, {"zero.stage": 3}),
}


@pytest.fixture(scope="module")
def alone(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(datasets, tmp_path_factory, 1, CONTEXT, [2, 4])


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for own, reference in zip(untimed(ours), untimed(theirs), strict=True):
        assert own.keys() == reference.keys()
        for name, value in reference.items():
            if isinstance(value, float):
                assert relative(own[name], value) <= 1e-5, (own["step"], name)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(MESHES)],
)
def test_a_mesh_makes_the_same_run(datasets: Datasets, alone: Path, tmp_path: Path, mesh: str) -> None:
    ranks, own = MESHES[mesh]
    run_ranks(ranks, arguments(datasets, "run", CONTEXT | own), tmp_path).check()
    assert_same(metrics(tmp_path / "run"), metrics(alone))
    assert_same(evaluations(tmp_path / "run"), evaluations(alone))


def test_a_run_is_resumed_inside_the_stage(datasets: Datasets, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    shutil.rmtree(checkpoints(run_dir)[4])
    (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
    run_ranks(2, [*arguments(datasets, "run", CONTEXT), "--resume"], tmp_path).check()
    assert_same(metrics(run_dir), metrics(alone))
