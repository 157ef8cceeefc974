"""Launched runs with cut weights and offloaded optimizer: all stages, resumed at other ZeRO stages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import PROGRAM, REPOSITORY, run_ranks
from helpers.runs import (
    CUT,
    OFFLOADED,
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

from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

pytestmark = pytest.mark.slow
STAGES = (
    "{name: joint_lm, steps: 3}",
    "{name: interaction_sft, steps: 3, noise_level: 0.05, slot_dropout: 0.1}",
    "{name: memory_attention, steps: 2, noise_level: 0.05}",
    "{name: smat, steps: 4, unfreeze: {decoder: 2}}",
)
STEPS = 12
SETTINGS: dict[str, Any] = {
    "batch.packs": 4,
    "batch.pack_tokens": 64,
    "batch.lanes": 4,
    "batch.window": 2,
    "model.stm_init": "{distribution: standard, shared: false}",
    "model.memory_attention.gate.bias_init": 0.0,
    "evaluation.max_packs": 3,
    "evaluation.max_conversations": 6,
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 4,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 100,
    "stages": f"[{', '.join(STAGES)}]",
}
WHOLE: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "ZeRO 3": (2, CUT),
    "ZeRO 3, offloaded": (2, CUT | OFFLOADED | {"batch.micro_packs": 1, "batch.micro_lanes": 1}),
    "ZeRO 1, offloaded": (2, OFFLOADED),
    "ZeRO 2, offloaded": (2, OFFLOADED | {"zero.stage": 2}),
}


@pytest.fixture(scope="module")
def whole(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs with all of their checkpoints."""
    saved = list(range(1, STEPS + 1))
    return {
        name: uninterrupted(datasets, tmp_path_factory, ranks, SETTINGS | own, saved)
        for name, (ranks, own) in WHOLE.items()
    }


def resume(datasets: Datasets, folder: Path, step: int, ranks: int, own: dict[str, Any]) -> Path:
    """What becomes of the run in ``folder`` when all after ``step`` is lost."""
    run_dir = folder / "run"
    for number, path in checkpoints(run_dir).items():
        if number > step:
            shutil.rmtree(path)
    result = run_ranks(ranks, [*arguments(datasets, "run", SETTINGS | own), "--resume"], folder).check()
    assert f"from step {step}" in result.output
    return run_dir


def assert_close(own: Any, reference: Any, where: str) -> None:
    """Equal texts, integers and None; numbers up to rounding; the same keys, at every depth."""
    if isinstance(reference, dict):
        assert own.keys() == reference.keys(), where
        for key, value in reference.items():
            assert_close(own[key], value, f"{where}.{key}")
    elif isinstance(reference, list):
        for index, pair in enumerate(zip(own, reference, strict=True)):
            assert_close(*pair, f"{where}.{index}")
    elif isinstance(reference, float):
        assert relative(own, reference) <= 1e-5, (where, own, reference)
    else:
        assert own == reference, where


def assert_same_path(ours: Path, theirs: Path) -> None:
    """Every logged number, evaluations, weights and moments of the end, up to rounding."""
    assert_close(untimed(metrics(ours)), untimed(metrics(theirs)), "metrics")
    assert_close(untimed(evaluations(ours)), untimed(evaluations(theirs)), "evaluations")
    found, expected = (tensors(checkpoints(folder)[STEPS]) for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        error = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-2)
        assert error <= 5e-4, (name, float(error))
    assert trainer_state(checkpoints(ours)[STEPS]) == trainer_state(checkpoints(theirs)[STEPS])


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "1 rank"])
def test_where_state_lies_does_not_change_a_run(whole: dict[str, Path], name: str) -> None:
    assert_same_path(whole[name], whole["1 rank"])


def test_a_run_goes_on_from_zero_3_to_1_and_back(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path
) -> None:
    """Inside of stages, on other numbers of ranks; moments and counters are taken along."""
    shutil.copytree(whole["ZeRO 3"], tmp_path / "run")
    resume(datasets, tmp_path, 2, 4, {})
    assert_same_path(tmp_path / "run", whole["1 rank"])
    resume(datasets, tmp_path, 5, 2, CUT | OFFLOADED)
    assert_same_path(tmp_path / "run", whole["1 rank"])
    resume(datasets, tmp_path, 11, 1, CUT)
    assert_same_path(tmp_path / "run", whole["1 rank"])


@pytest.mark.parametrize("name", ["ZeRO 3, offloaded", "ZeRO 2, offloaded", "ZeRO 1, offloaded"])
@pytest.mark.parametrize("step", [4, 10])
def test_a_run_resumed_as_it_was_ends_bit_by_bit_the_same(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, name: str, step: int
) -> None:
    ranks, own = WHOLE[name]
    shutil.copytree(whole[name], tmp_path / "run")
    run_dir = resume(datasets, tmp_path, step, ranks, own)
    assert untimed(metrics(run_dir)) == untimed(metrics(whole[name]))
    assert untimed(evaluations(run_dir)) == untimed(evaluations(whole[name]))
    found, expected = (tensors(checkpoints(one)[STEPS]) for one in (run_dir, whole[name]))
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_its_checkpoints_are_evaluated_in_one_process(whole: dict[str, Path]) -> None:
    for record in evaluations(whole["ZeRO 3"]):
        found = evaluate_checkpoint(checkpoints(whole["ZeRO 3"])[record["step"]])
        for name, value in found.items():
            if isinstance(value, float):
                assert value == pytest.approx(record[name], rel=1e-5), (record["stage"], name)


def test_kernels_of_gpus_find_cut_weights_whole(datasets: Datasets, tmp_path: Path) -> None:
    """Kernels take the weights of several modules at once, outside of the forward passes of these."""
    interpreter = REPOSITORY / "tests" / "helpers" / "interpreted.py"
    short = {
        "precision": "bf16",
        "batch.packs": 2,
        "batch.lanes": 2,
        "stages": "[{name: joint_lm, steps: 2}, {name: memory_attention, steps: 2}, {name: smat, steps: 2}]",
        "evaluation.max_packs": 1,
        "evaluation.max_conversations": 2,
        "evaluation.samples": 0,
    }
    found = {}
    for name, program, own in (
        ("operators", PROGRAM, {}),
        ("kernels", interpreter, {}),
        ("kernels, cut", interpreter, CUT),
    ):
        command = arguments(datasets, "run", SETTINGS | short | own)
        run_ranks(2, command, tmp_path / name, timeout=600.0, program=program).check()
        found[name] = untimed(metrics(tmp_path / name / "run"))
    assert_close(found["kernels, cut"], found["kernels"], "metrics")
    assert found["kernels"] != found["operators"]  # the kernels have run
