"""One run file on many meshes: the same losses, norms, counts and weights, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import (
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

from rxt_dist.config import RunConfig, load_config

TOLERANCE = 1e-5
# Rounding in another order moves a weight whose gradient is nearly zero by a visible share of one update,
# since Adam divides by the gradient's size.
WEIGHT_TOLERANCE = 2e-4
# Noise and slot dropout are on in the second stage: they too must not depend on where a token is processed.
COMMON = {"stages.1.noise_level": 0.05, "stages.1.slot_dropout": 0.1}
TEXT_COMPONENTS = ("mlm_loss", "mlm_accuracy", "ar_loss", "ar_accuracy", "aux_loss")
TEXT_STAGES = ("joint_lm", "interaction_sft")


@dataclass(frozen=True)
class Mesh:
    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)


REFERENCE = "1 rank"
MESHES = {
    REFERENCE: Mesh(1),
    "2 ranks": Mesh(2),
    "4 ranks": Mesh(4),
    "2 ranks, ZeRO 2": Mesh(2, {"zero.stage": 2}),
    "2 ranks, accumulation": Mesh(2, {"batch.micro_packs": 1}),
    "2 ranks, ZeRO 2, accumulation, small buckets": Mesh(
        2, {"zero.stage": 2, "batch.micro_packs": 2, "zero.reduce_bucket_size": 3000}
    ),
}
OTHERS = [name for name in MESHES if name != REFERENCE]


@pytest.fixture(scope="module")
def runs(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of `tiny`, all of its stages, by mesh."""
    found = {}
    for name, mesh in MESHES.items():
        folder = tmp_path_factory.mktemp("mesh")
        run_ranks(mesh.ranks, arguments(datasets, folder / "run", COMMON | mesh.settings), folder).check()
        found[name] = folder / "run"
    return found


@pytest.fixture(scope="module")
def config(runs: dict[str, Path]) -> RunConfig:
    return load_config(runs[REFERENCE] / "config.yaml")


def stage_ends(config: RunConfig) -> list[int]:
    """The run's step at the end of every stage."""
    return [sum(stage.steps for stage in config.stages[: i + 1]) for i in range(len(config.stages))]


def assert_close(own: dict[str, Any], reference: dict[str, Any]) -> None:
    """Same keys; equal integers and texts, numbers up to rounding."""
    assert own.keys() == reference.keys()
    exact = {key for key, value in reference.items() if isinstance(value, (int, str)) or key == "lr"}
    assert {key: own[key] for key in exact} == {key: reference[key] for key in exact}
    numbers = {key for key, value in reference.items() if isinstance(value, float)}
    errors = {key: relative(own[key], reference[key]) for key in numbers}
    assert max(errors.values()) <= TOLERANCE, (own["step"], errors)


@pytest.mark.parametrize("mesh", OTHERS)
def test_every_step_is_the_same_on_every_mesh(runs: dict[str, Path], mesh: str) -> None:
    ours, theirs = untimed(metrics(runs[mesh])), untimed(metrics(runs[REFERENCE]))
    assert len(ours) >= 20
    for own, reference in zip(ours, theirs, strict=True):
        assert_close(own, reference)


@pytest.mark.parametrize("mesh", OTHERS)
def test_evaluations_are_the_same_on_every_mesh(runs: dict[str, Path], mesh: str) -> None:
    ours, theirs = untimed(evaluations(runs[mesh])), untimed(evaluations(runs[REFERENCE]))
    for own, reference in zip(ours, theirs, strict=True):
        # Greedy continuations may part where two logits are equal up to rounding; prompts may not.
        samples = [record.pop("samples", []) for record in (own, reference)]
        prompts = [[sample["prompt"] for sample in found] for found in samples]
        assert prompts[0] == prompts[1]
        assert_close(own, reference)


@pytest.mark.parametrize("mesh", OTHERS)
def test_weights_and_data_position_are_the_same_on_every_mesh(
    runs: dict[str, Path], config: RunConfig, mesh: str
) -> None:
    ours, theirs = checkpoints(runs[mesh]), checkpoints(runs[REFERENCE])
    assert list(ours) == list(theirs) == stage_ends(config)[-config.checkpoint.keep_last :]
    for step, folder in ours.items():
        assert trainer_state(folder) == trainer_state(theirs[step])
        found, expected = tensors(folder), tensors(theirs[step])
        assert found.keys() == expected.keys()
        for name, values in found.items():
            error = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-30)
            assert error <= WEIGHT_TOLERANCE, (step, name, float(error))


def test_there_is_one_complete_record_a_step(runs: dict[str, Path], config: RunConfig) -> None:
    stages = [stage.name for stage in config.stages for _ in range(stage.steps)]
    for folder in runs.values():
        records = metrics(folder)
        assert [record["step"] for record in records] == list(range(1, len(stages) + 1))
        assert [record["stage"] for record in records] == stages
        for record in records:
            assert all(math.isfinite(record[key]) for key in record if key != "stage")
            assert record["step_seconds"] > 0
            assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        for before, after in pairwise(records):
            assert after["total_tokens"] == before["total_tokens"] + after["tokens"]


def test_records_of_the_text_stages_hold_what_the_documentation_lists(runs: dict[str, Path]) -> None:
    records = [r for r in metrics(runs["2 ranks"]) if r["stage"] in TEXT_STAGES]
    assert len(records) == 20
    counts = ("lr", "tokens", "total_tokens")
    for record in records:
        assert tuple(record) == ("step", "stage", "loss", *TEXT_COMPONENTS, "grad_norm", *counts, *TIMES)
        parts = record["mlm_loss"] + record["ar_loss"] + 0.01 * record["aux_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-6)
    for first, last in ((records[0], records[9]), (records[10], records[19])):
        assert last["mlm_loss"] < first["mlm_loss"]
        assert last["ar_loss"] < first["ar_loss"]


def test_every_stage_is_evaluated_once(runs: dict[str, Path], config: RunConfig) -> None:
    expected = [(step, stage.name) for step, stage in zip(stage_ends(config), config.stages, strict=True)]
    for folder in runs.values():
        records = evaluations(folder)
        assert [(record["step"], record["stage"]) for record in records] == expected
        assert [record["stage_index"] for record in records] == list(range(len(expected)))
        for record in records[: len(TEXT_STAGES)]:
            described = {"step", "stage", "stage_index", "split", "tokens", "seconds", "samples"}
            assert set(record) == described | {"loss", *TEXT_COMPONENTS}
            assert record["split"] == "val"
            assert 0 <= record["mlm_accuracy"] <= 1
            assert 0 <= record["ar_accuracy"] <= 1
            assert len(record["samples"]) == 3
            assert all(sample.keys() == {"prompt", "continuation"} for sample in record["samples"])
        prompts = [sample["prompt"] for sample in records[1]["samples"]]
        assert all(text.startswith("[BOS][Q]") and text.endswith("[A]") for text in prompts)
        # A trained model does better on held-out text than one that guesses.
        assert records[0]["ar_loss"] < math.log(320)
