"""A stage in which components join is continued bit by bit, wherever it is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import arguments, checkpoints, metrics, tensors, trainer_state, uninterrupted, untimed

STEPS, MEMORY, ENCODER = 7, 2, 4
SETTINGS: dict[str, Any] = {
    "batch.lanes": 4,
    "batch.window": 2,
    "optimizer": "{lr: 5e-3, warmup_steps: 2, weight_decay: 0.1}",
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 100,
    "evaluation.max_conversations": 4,
    "stages": f"[{{name: smat, steps: {STEPS}, "
    f"unfreeze: {{memory_attention: {MEMORY}, encoder: {ENCODER}}}}}]",
}
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32, ZeRO 1": (2, {"precision": "fp32"}),
    "bf16, ZeRO 1": (2, {"precision": "bf16"}),
    "bf16, ZeRO 2": (2, {"precision": "bf16", "zero.stage": 2, "batch.micro_lanes": 1}),
    "bf16, ZeRO 3, offloaded": (
        2,
        {
            "precision": "bf16",
            "zero": "{stage: 3, offload_optimizer: cpu, reduce_dtype: fp32}",
            "deepspeed.zero_optimization.stage3_param_persistence_threshold": 700,
        },
    ),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "fp32, ZeRO 1"]


@pytest.fixture(scope="module", params=["fp32, ZeRO 1", *SLOW])
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(variant: str, datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ranks, own = VARIANTS[variant]
    return uninterrupted(datasets, tmp_path_factory, ranks, SETTINGS | own, list(range(1, STEPS + 1)))


def test_counters_moments_and_weights_begin_with_their_component(whole: Path) -> None:
    """Under bf16 too, where the engine computes with rounded copies of the weights."""
    before: dict[str, torch.Tensor] = {}
    for step, folder in checkpoints(whole).items():
        after = tensors(folder)
        counters = trainer_state(folder)["optimizer_steps"]
        # A counter that still runs while its group is frozen is set to zero when it joins.
        assert counters == [step, *(step if step <= start else step - start for start in (MEMORY, ENCODER))]
        for component, start in (("memory_attention", MEMORY), ("encoder.layers", ENCODER), ("decoder", 0)):
            moments = [
                n for n in after if n.startswith("exp_avg") and n.partition(".")[2].startswith(component)
            ]
            assert any(after[name].any() for name in moments) == (step > start), (step, component)
            if before:
                weights = [name for name in after if name.startswith(f"weight.{component}")]
                moved = any(not torch.equal(after[name], before[name]) for name in weights)
                assert moved == (step > start), (step, component)
        before = after


@pytest.mark.parametrize(
    "step",
    [
        MEMORY,
        MEMORY + 1,
        pytest.param(MEMORY - 1, marks=pytest.mark.slow),
        pytest.param(ENCODER, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_stage_continues_as_if_it_had_not_been(
    variant: str, whole: Path, datasets: Datasets, tmp_path: Path, step: int
) -> None:
    ranks, own = VARIANTS[variant]
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for number, path in checkpoints(run_dir).items():
        if number > step:
            shutil.rmtree(path)
    run_ranks(ranks, [*arguments(datasets, "run", SETTINGS | own), "--resume"], tmp_path).check()
    assert untimed(metrics(run_dir)) == untimed(metrics(whole))
    for number, folder in checkpoints(run_dir).items():
        assert trainer_state(folder) == trainer_state(checkpoints(whole)[number])
    found, expected = tensors(checkpoints(run_dir)[STEPS]), tensors(checkpoints(whole)[STEPS])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("variant", ["fp32, ZeRO 1"], indirect=True)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_another_number_of_ranks_continues_too(
    variant: str, whole: Path, datasets: Datasets, tmp_path: Path, ranks: int
) -> None:
    own = VARIANTS[variant][1]
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for number, path in checkpoints(run_dir).items():
        if number > MEMORY:
            shutil.rmtree(path)
    run_ranks(ranks, [*arguments(datasets, "run", SETTINGS | own), "--resume"], tmp_path).check()
    for ours, theirs in zip(untimed(metrics(run_dir)), untimed(metrics(whole)), strict=True):
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
    state = trainer_state(checkpoints(run_dir)[STEPS])
    assert state["optimizer_steps"] == [STEPS, STEPS - MEMORY, STEPS - ENCODER]
