"""The memory stages on many meshes, and against plain autograd over all lanes in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets, with_system_prompts
from helpers.launch import run_ranks
from helpers.plain_smat import PlainSmat
from helpers.runs import (
    arguments,
    checkpoints,
    evaluations,
    metrics,
    relative,
    tensors,
    trainer_state,
    untimed,
)

from rxt_dist.checkpoint import CheckpointReader
from rxt_dist.config import load_config
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import build_model
from rxt_dist.stages.expert_statistics import EXPERT_STATISTICS
from rxt_dist.stages.memory_statistics import MEMORY_STATISTICS

TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 5e-4  # Adam divides by the gradient's size, so rounding shows where it is nearly zero
LANES = 4
WRITE_STEPS, SMAT_STEPS = 4, 5
# Everything random is on: it too must not depend on where a lane is processed.
SETTINGS: dict[str, Any] = {
    "batch.lanes": LANES,
    "model.stm_init": "{distribution: standard, shared: false}",
    "model.memory_attention.gate.bias_init": 0.0,
    "checkpoint.keep_last": 10,
    "stages": f"[{{name: memory_attention, steps: {WRITE_STEPS}, noise_level: 0.05, label_noise_level: 0.05, "
    f"label_weight_jitter: 0.15, stm_difference_scale: 0.01}}, {{name: smat, steps: {SMAT_STEPS}}}]",
}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "2 ranks": (2, {}),
    "4 ranks": (4, {}),
    "2 ranks, accumulation": (2, {"batch.micro_lanes": 1}),
    "4 ranks, 4 expert ranks": (4, {"parallel.expert_size": 4}),
    "1 rank, window 1": (1, {"batch.window": 1}),
    "1 rank, two datasets": (1, {"data.conversations": "mixed"}),
    "2 ranks, two datasets, accumulation": (2, {"data.conversations": "mixed", "batch.micro_lanes": 1}),
    "2 ranks, window 1, ZeRO 2": (2, {"batch.window": 1, "batch.micro_lanes": 1, "zero.stage": 2}),
}
PAIRS = [
    ("1 rank", "2 ranks"),
    pytest.param("1 rank", "4 ranks", marks=pytest.mark.slow),  # with expert ranks in the quick suite
    ("1 rank", "2 ranks, accumulation"),
    ("1 rank", "4 ranks, 4 expert ranks"),
    ("1 rank, window 1", "2 ranks, window 1, ZeRO 2"),
    ("1 rank, two datasets", "2 ranks, two datasets, accumulation"),
]


class Runs(dict[str, Path]):
    """Run folders by mesh; each run is made when it is first asked for."""

    def __init__(self, datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._datasets, self._make_folder = datasets, tmp_path_factory.mktemp
        prompted = with_system_prompts(datasets, tmp_path_factory.mktemp("prompted"))
        self._mixed = f"[{{path: {prompted}, weight: 2}}, {{path: {datasets.conversations}}}]"

    def __missing__(self, name: str) -> Path:
        (ranks, own), folder = MESHES[name], self._make_folder("mesh")
        if own.get("data.conversations") == "mixed":
            own = own | {"data.conversations": self._mixed}
        run_ranks(ranks, arguments(self._datasets, folder / "run", SETTINGS | own), folder).check()
        self[name] = folder / "run"
        return self[name]


@pytest.fixture(scope="module")
def runs(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(datasets, tmp_path_factory)


def assert_close(own: Any, reference: Any, where: str) -> None:
    """Equal texts, integers and None; numbers up to rounding; the same keys, at every depth."""
    if isinstance(reference, dict):
        assert own.keys() == reference.keys(), where
        for key, value in reference.items():
            assert_close(own[key], value, f"{where}.{key}")
    elif isinstance(reference, list):
        assert len(own) == len(reference), where
        for index, pair in enumerate(zip(own, reference, strict=True)):
            assert_close(*pair, f"{where}.{index}")
    elif isinstance(reference, float):
        assert relative(own, reference) <= TOLERANCE, (where, own, reference)
    else:
        assert own == reference, where


@pytest.mark.parametrize(("reference", "mesh"), PAIRS)
def test_every_step_is_the_same_on_every_mesh(runs: Runs, reference: str, mesh: str) -> None:
    ours, theirs = untimed(metrics(runs[mesh])), untimed(metrics(runs[reference]))
    assert len(ours) == WRITE_STEPS + SMAT_STEPS
    assert_close(ours, theirs, mesh)


@pytest.mark.parametrize(("reference", "mesh"), PAIRS)
def test_evaluations_are_the_same_on_every_mesh(runs: Runs, reference: str, mesh: str) -> None:
    ours, theirs = untimed(evaluations(runs[mesh])), untimed(evaluations(runs[reference]))
    memory = theirs[1]["memory"]
    assert sum(count for _, count in memory["true"]["recall_by_distance"].values()) > 0
    assert_close(ours, theirs, mesh)


@pytest.mark.parametrize(("reference", "mesh"), PAIRS)
def test_weights_and_memories_are_the_same_on_every_mesh(runs: Runs, reference: str, mesh: str) -> None:
    ours, theirs = checkpoints(runs[mesh]), checkpoints(runs[reference])
    assert list(ours) == list(theirs) == [WRITE_STEPS, WRITE_STEPS + SMAT_STEPS]
    for step, folder in ours.items():
        assert trainer_state(folder) == trainer_state(theirs[step])
        found, expected = tensors(folder), tensors(theirs[step])
        assert found.keys() == expected.keys()
        lanes = sorted(name for name in found if name.startswith("stm."))
        assert lanes == [f"stm.lane-{lane:06d}" for lane in range(LANES)]
        assert not torch.equal(found[lanes[0]], found[lanes[1]])
        for name, values in found.items():
            # What starts at zero is small: ten updates are the least that rounding is compared with.
            error = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-2)
            assert error <= WEIGHT_TOLERANCE, (step, name, float(error))


def test_records_hold_the_losses_of_their_stage(runs: Runs) -> None:
    memory = (*MEMORY_STATISTICS, "reset_share")
    counts = ("corrupt_blocks", "grad_norm", "lr", "tokens", "total_tokens")
    for record in untimed(metrics(runs["2 ranks"])):
        if record["stage"] == "smat":
            parts = ("answer_loss", "answer_accuracy", "aux_loss")
            loss = record["answer_loss"] + 0.01 * record["aux_loss"]
        else:
            parts = ("memory_loss", "stm_difference")
            loss = record["memory_loss"] + 0.01 * record["stm_difference"]
        experts = EXPERT_STATISTICS if record["stage"] == "smat" else ()
        assert tuple(record) == ("step", "stage", "loss", *parts, *memory, *experts, *counts)
        assert record["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "mesh", ["2 ranks, accumulation", "2 ranks, window 1, ZeRO 2", "2 ranks, two datasets, accumulation"]
)
def test_smat_is_plain_autograd_over_all_lanes(runs: Runs, mesh: str) -> None:
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    config = load_config(runs[mesh] / "config.yaml")
    model = build_model(config.model, config.seed)
    CheckpointReader(checkpoints(runs[mesh])[WRITE_STEPS]).load_weights(model)
    plain = PlainSmat(config, model, 1, SMAT_STEPS)
    logged = metrics(runs[mesh])[WRITE_STEPS:]
    assert max(place.number for places in plain.places for place in places) >= 2
    for number, record in enumerate(logged):
        expected = plain.step(number)
        errors = {name: relative(record[name], value) for name, value in expected.items()}
        assert max(errors.values()) <= TOLERANCE, (record["step"], errors)
    # The memory that the lanes carry on is part of the result.
    found = tensors(checkpoints(runs[mesh])[WRITE_STEPS + SMAT_STEPS])
    for lane, stm in plain.carried.items():
        error = (found[f"stm.lane-{lane:06d}"] - stm.flatten()).abs().max() / stm.abs().max()
        assert error <= WEIGHT_TOLERANCE, (lane, float(error))
