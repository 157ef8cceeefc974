"""Long windows, recomputation, system prompts and gradual unfreezing on many meshes, and against plain
autograd and torch's AdamW over all lanes in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets, with_system_prompts
from helpers.launch import run_ranks
from helpers.plain_smat import PlainSmat
from helpers.runs import arguments, checkpoints, evaluations, metrics, relative, tensors, untimed

from rxt_dist.config import load_config
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import build_model
from rxt_dist.stages.memory_statistics import MEMORY_STATISTICS

TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 2e-4  # Adam divides by the gradient's size, so rounding shows where it is nearly zero
LANES, WINDOW, STEPS = 8, 4, 6
STARTS = {"memory_attention": 2, "encoder": 4}
SETTINGS: dict[str, Any] = {
    "batch.lanes": LANES,
    "batch.window": WINDOW,
    "model.stm_init": "{distribution: standard, shared: false}",
    "model.memory_attention.gate.bias_init": 0.0,
    "optimizer": "{lr: 3e-3, warmup_steps: 2, weight_decay: 0.1, min_lr_ratio: 0.1}",
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 100,
    "evaluation.max_conversations": 6,
    "stages": f"[{{name: smat, steps: {STEPS}, system_prompts: true, "
    f"unfreeze: {{memory_attention: {STARTS['memory_attention']}, encoder: {STARTS['encoder']}}}}}]",
}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "2 ranks": (2, {"runtime.recompute": "interaction"}),
    "4 ranks, accumulation, ZeRO 2": (
        4,
        {"runtime.recompute": "interaction", "batch.micro_lanes": 1, "zero.stage": 2},
    ),
    "2 ranks, 2 expert ranks": (
        2,
        {"runtime.recompute": "interaction", "batch.micro_lanes": 2, "parallel.expert_size": 2},
    ),
}
OTHERS = [name for name in MESHES if name != "1 rank"]


@pytest.fixture(scope="module")
def runs(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by mesh, with a checkpoint of every step."""
    prompted = with_system_prompts(datasets, tmp_path_factory.mktemp("prompted"))
    found = {}
    for name, (ranks, own) in MESHES.items():
        folder = tmp_path_factory.mktemp("mesh")
        settings = SETTINGS | {"data.conversations": prompted} | own
        run_ranks(ranks, arguments(datasets, folder / "run", settings), folder).check()
        found[name] = folder / "run"
    return found


@pytest.mark.parametrize("mesh", OTHERS)
def test_every_step_is_the_same_on_every_mesh(runs: dict[str, Path], mesh: str) -> None:
    ours, theirs = untimed(metrics(runs[mesh])), untimed(metrics(runs["1 rank"]))
    assert len(ours) == len(theirs) == STEPS
    for own, reference in zip(ours, theirs, strict=True):
        assert own.keys() == reference.keys()
        assert {*MEMORY_STATISTICS, "reset_share", "grad_norm"} <= own.keys()
        for name, value in reference.items():
            if isinstance(value, float):
                assert relative(own[name], value) <= TOLERANCE, (own["step"], name, own[name], value)
            else:
                assert own[name] == value, (own["step"], name)


@pytest.mark.parametrize("mesh", OTHERS)
def test_weights_and_memories_are_the_same_on_every_mesh(runs: dict[str, Path], mesh: str) -> None:
    found, expected = (tensors(checkpoints(runs[name])[STEPS]) for name in (mesh, "1 rank"))
    assert found.keys() == expected.keys()
    lanes = [found[f"stm.lane-{lane:06d}"] for lane in range(LANES)]
    for lane, stm in enumerate(lanes):  # no rank's memories are those of another
        assert not any(torch.equal(stm, other) for other in lanes[:lane])
    for name, values in found.items():
        error = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-2)
        assert error <= WEIGHT_TOLERANCE, (name, float(error))


def test_evaluations_are_the_same_on_every_mesh(runs: dict[str, Path]) -> None:
    (reference,) = evaluations(runs["1 rank"])
    assert len(reference["by_interaction"]) > WINDOW
    for mesh in OTHERS:
        (own,) = evaluations(runs[mesh])
        assert own["statistics"] == pytest.approx(reference["statistics"], rel=TOLERANCE)
        for row, other in zip(own["by_interaction"], reference["by_interaction"], strict=True):
            for memory in ("true", "fresh", "foreign"):
                assert row[memory] == pytest.approx(other[memory], rel=TOLERANCE)


Plain = tuple[PlainSmat, list[dict[str, float]]]


@pytest.fixture(scope="module")
def plain_stage(runs: dict[str, Path]) -> Plain:
    """The whole stage in one process, and the record of each of its steps; it is the same for every mesh."""
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    config = load_config(runs["1 rank"] / "config.yaml")
    plain = PlainSmat(config, build_model(config.model, config.seed), 0, STEPS)
    assert sorted(plain.groups()) == [0, *STARTS.values()]
    return plain, [plain.step(number) for number in range(STEPS)]


@pytest.mark.parametrize("mesh", list(MESHES))
def test_the_stage_is_plain_autograd_with_components_that_join(
    runs: dict[str, Path], plain_stage: Plain, mesh: str
) -> None:
    plain, records = plain_stage
    for number, (record, expected) in enumerate(zip(metrics(runs[mesh]), records, strict=True)):
        errors = {name: relative(record[name], value) for name, value in expected.items()}
        assert max(errors.values()) <= TOLERANCE, (record["step"], errors)
        assert record["lr"] == pytest.approx(plain.rate(number, 0))
    assert plain.prompts_written > 2
    assert max(place.number for places in plain.places for place in places) >= 2
    found = tensors(checkpoints(runs[mesh])[STEPS])
    for lane, stm in plain.carried.items():
        error = (found[f"stm.lane-{lane:06d}"] - stm.flatten()).abs().max() / stm.abs().max()
        assert error <= WEIGHT_TOLERANCE, (lane, float(error))
    memory = dict(plain.model.memory_attention.named_parameters())["attention.q.weight"]
    stored = found["weight.memory_attention.attention.q.weight"]
    assert (stored - memory).abs().max() <= WEIGHT_TOLERANCE * memory.abs().max()


@pytest.mark.parametrize("mesh", list(MESHES))
def test_components_keep_every_bit_until_their_step(runs: dict[str, Path], mesh: str) -> None:
    """Weights and moments; the embedding trains with the decoder from the beginning."""
    before: dict[str, torch.Tensor] = {}
    for step, folder in checkpoints(runs[mesh]).items():
        after = tensors(folder)
        if before:
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                for component in ("encoder.layers", "memory_attention", "decoder", "encoder.embedding"):
                    names = [name for name in after if name.startswith(f"{kind}.{component}")]
                    moved = [name for name in names if not torch.equal(after[name], before[name])]
                    trains = step > STARTS.get(component.partition(".layers")[0], 0)
                    assert bool(moved) == trains, (step, kind, component)
                    if kind != "weight" and not trains:
                        assert not any(after[name].any() for name in names), (step, kind, component)
        before = after
