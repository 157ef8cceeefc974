"""One run file on many meshes: the same losses, norms, counts and weights, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import (
    SMALL,
    TIMES,
    arguments,
    checkpoints,
    evaluations,
    metrics,
    relative,
    tensors,
    trainer_state,
    untimed,
)

from rxt_dist.stages.expert_statistics import EXPERT_STATISTICS

TOLERANCE = 1e-5
# Rounding in another order moves a weight whose gradient is nearly zero by a visible share of one update,
# since Adam divides by the gradient's size.
WEIGHT_TOLERANCE = 2e-4
STAGE_STEPS = 8
STAGES = ("joint_lm", "interaction_sft")
# The text stages of the run file; noise and slot dropout are on in the second one, as they too must not
# depend on where a token is processed.
COMMON = {
    "stages": f"[{', '.join(f'{{name: {name}, steps: {STAGE_STEPS}}}' for name in STAGES)}]",
    "stages.1.noise_level": 0.05,
    "stages.1.slot_dropout": 0.1,
    "batch.pack_tokens": 128,
    "evaluation.sample_tokens": 4,
}
COMPONENTS = ("mlm_loss", "mlm_accuracy", "ar_loss", "ar_accuracy", "aux_loss")


@dataclass(frozen=True)
class Mesh:
    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)


REFERENCE = "1 rank"
MESHES = {
    REFERENCE: Mesh(1),
    "2 ranks": Mesh(2),
    "4 ranks": Mesh(4),
    "4 ranks, 2 expert ranks, ZeRO 2, accumulation": Mesh(
        4, {"parallel.expert_size": 2, "zero.stage": 2, "batch.micro_packs": 1}
    ),
    "4 ranks, 4 expert ranks": Mesh(4, {"parallel.expert_size": 4}),
    "2 ranks, ZeRO 2": Mesh(2, {"zero.stage": 2}),
    "2 ranks, accumulation": Mesh(2, {"batch.micro_packs": 1}),
    "2 ranks, ZeRO 2, accumulation, small buckets": Mesh(
        2, {"zero.stage": 2, "batch.micro_packs": 2, "zero.reduce_bucket_size": 3000}
    ),
}
SLOW = (
    "4 ranks",
    "4 ranks, 4 expert ranks",
    "2 ranks, ZeRO 2",
    "2 ranks, accumulation",
)  # another mesh has several of them at once
OTHERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in MESHES
    if name != REFERENCE
]

RunOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_of(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """The run folder of a mesh; each run is made when it is first asked for."""

    @cache
    def run(name: str) -> Path:
        mesh, folder = MESHES[name], tmp_path_factory.mktemp("mesh")
        run_ranks(mesh.ranks, arguments(datasets, folder / "run", COMMON | mesh.settings), folder).check()
        return folder / "run"

    return run


def assert_close(own: dict[str, Any], reference: dict[str, Any]) -> None:
    """Same keys; equal integers and texts, numbers up to rounding."""
    assert own.keys() == reference.keys()
    exact = {key for key, value in reference.items() if isinstance(value, (int, str)) or key == "lr"}
    assert {key: own[key] for key in exact} == {key: reference[key] for key in exact}
    numbers = {key for key, value in reference.items() if isinstance(value, float)}
    errors = {key: relative(own[key], reference[key]) for key in numbers}
    assert max(errors.values()) <= TOLERANCE, (own["step"], errors)


@pytest.mark.parametrize("mesh", OTHERS)
def test_every_step_is_the_same_on_every_mesh(run_of: RunOf, mesh: str) -> None:
    ours, theirs = untimed(metrics(run_of(mesh))), untimed(metrics(run_of(REFERENCE)))
    assert len(ours) == 2 * STAGE_STEPS
    for own, reference in zip(ours, theirs, strict=True):
        assert_close(own, reference)


@pytest.mark.parametrize("mesh", OTHERS)
def test_evaluations_are_the_same_on_every_mesh(run_of: RunOf, mesh: str) -> None:
    ours, theirs = untimed(evaluations(run_of(mesh))), untimed(evaluations(run_of(REFERENCE)))
    for own, reference in zip(ours, theirs, strict=True):
        # Greedy continuations may part where two logits are equal up to rounding; prompts may not.
        samples = [record.pop("samples") for record in (own, reference)]
        prompts = [[sample["prompt"] for sample in found] for found in samples]
        assert prompts[0] == prompts[1]
        assert_close(own, reference)


@pytest.mark.parametrize("mesh", OTHERS)
def test_weights_and_data_position_are_the_same_on_every_mesh(run_of: RunOf, mesh: str) -> None:
    ours, theirs = checkpoints(run_of(mesh)), checkpoints(run_of(REFERENCE))
    assert list(ours) == list(theirs) == [STAGE_STEPS, 2 * STAGE_STEPS]
    for step, folder in ours.items():
        assert trainer_state(folder) == trainer_state(theirs[step])
        found, expected = tensors(folder), tensors(theirs[step])
        assert found.keys() == expected.keys()
        for name, values in found.items():
            error = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-30)
            assert error <= WEIGHT_TOLERANCE, (step, name, float(error))


def test_there_is_one_complete_record_a_step(run_of: RunOf) -> None:
    records = metrics(run_of("2 ranks"))
    assert [record["step"] for record in records] == list(range(1, 2 * STAGE_STEPS + 1))
    assert [record["stage"] for record in records] == [name for name in STAGES for _ in range(STAGE_STEPS)]
    counts = ("corrupt_blocks", "grad_norm", "lr", "tokens", "total_tokens")
    for record in records:
        assert tuple(record) == ("step", "stage", "loss", *COMPONENTS, *EXPERT_STATISTICS, *counts, *TIMES)
        assert 0.5 < record["expert_load_entropy"] <= 1
        assert 1 <= record["expert_load_max"] <= 4
        assert all(math.isfinite(record[key]) for key in record if key != "stage")
        parts = record["mlm_loss"] + record["ar_loss"] + 0.01 * record["aux_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-6)
        assert record["step_seconds"] > 0
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
    for before, after in pairwise(records):
        assert after["total_tokens"] == before["total_tokens"] + after["tokens"]
    for first, last in ((records[0], records[STAGE_STEPS - 1]), (records[STAGE_STEPS], records[-1])):
        assert last["mlm_loss"] < first["mlm_loss"]
        assert last["ar_loss"] < first["ar_loss"]


def test_every_stage_is_evaluated_once(run_of: RunOf) -> None:
    records = evaluations(run_of("2 ranks"))
    assert [(r["step"], r["stage"], r["stage_index"], r["split"]) for r in records] == [
        (STAGE_STEPS, "joint_lm", 0, "val"),
        (2 * STAGE_STEPS, "interaction_sft", 1, "val"),
    ]
    for record in records:
        described = {"step", "stage", "stage_index", "split", "tokens", "seconds", "samples"}
        assert set(record) == described | {"loss", *COMPONENTS}
        assert 0 <= record["mlm_accuracy"] <= 1
        assert 0 <= record["ar_accuracy"] <= 1
        assert len(record["samples"]) == 3
        assert all(sample.keys() == {"prompt", "continuation"} for sample in record["samples"])
    prompts = [sample["prompt"] for sample in records[1]["samples"]]
    assert all(text.startswith("[BOS][Q]") and text.endswith("[A]") for text in prompts)
    # A trained model does better on held-out text than one that guesses.
    assert records[0]["ar_loss"] < math.log(320)


def test_fewer_log_lines_are_the_same_run(datasets: Datasets, tmp_path: Path) -> None:
    """Every third step and the last one of a stage; a line still speaks of one step."""
    for name, interval in (("all", 1), ("some", 3)):
        settings = SMALL | {"metrics.log_every_steps": interval}
        run_ranks(1, arguments(datasets, name, settings), tmp_path).check()
    everything, logged = (untimed(metrics(tmp_path / name)) for name in ("all", "some"))
    assert [record["step"] for record in logged] == [3, 5, 6, 9, 10]
    assert logged == [record for record in everything if record["step"] in (3, 5, 6, 9, 10)]
