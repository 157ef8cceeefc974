"""Launched runs with spread experts: resumed on other meshes, evaluated alone, started from other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.mesh_runs import SAVED, SETTINGS, STEPS, assert_same_path, resumed
from helpers.runs import arguments, checkpoints, evaluations, metrics, tensors, uninterrupted, untimed

from rxt_dist.stages.expert_statistics import EXPERT_STATISTICS
from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

SPREAD = {"parallel.expert_size": 2}
BALANCED = {
    "model.decoder.moe.aux_loss": "switch",
    "model.decoder.moe.z_loss_weight": 0.001,
    "model.decoder.moe.bias_update_rate": 0.01,
}
WHOLE: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "2 expert ranks": (2, SPREAD),
    "balanced": (2, SPREAD | BALANCED),
}


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
        pytest.param("2 expert ranks", 5, 4, {"parallel.expert_size": 2}, marks=pytest.mark.slow),
        ("balanced", 4, 1, BALANCED),
        pytest.param("balanced", 8, 4, SPREAD | BALANCED | {"zero.stage": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_on_another_mesh(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, start: str, step: int, ranks: int, own: dict
) -> None:
    """Moments and counters too: the steps after the checkpoint are those of the uninterrupted run."""
    run_dir = resumed(datasets, tmp_path, whole[start], step, ranks, own)
    assert_same_path(run_dir, whole[start])


@pytest.mark.parametrize("name", ["2 expert ranks", "balanced"])
def test_a_run_resumed_on_its_own_mesh_ends_bit_by_bit_the_same(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    run_dir = resumed(datasets, tmp_path, whole[name], 8, *WHOLE[name])
    assert untimed(metrics(run_dir)) == untimed(metrics(whole[name]))
    found, expected = (tensors(checkpoints(one)[STEPS]) for one in (run_dir, whole[name]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


def test_selection_biases_move_by_the_update_rate_while_the_decoder_trains(whole: dict[str, Path]) -> None:
    """The steps of both stages that train it are 1 to 5 and 8 to 10."""
    rate = BALANCED["model.decoder.moe.bias_update_rate"]
    before: dict[str, torch.Tensor] = {}
    for step, most in zip(SAVED, (2, 2, 1, 0, 1, 2), strict=True):
        found = tensors(checkpoints(whole["balanced"])[step])
        biases = {name: values for name, values in found.items() if name.endswith("selection_bias")}
        assert len(biases) == 2
        for name, values in biases.items():
            moves = (values - before.get(name, torch.zeros_like(values))) / rate
            torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-4)
            assert moves.abs().max().round() <= most
            assert (moves.abs().max() > 0.5) == (most > 0)
        before = biases
        shares = [values for name, values in found.items() if name.startswith("load_share.")]
        assert len(shares) == 2
        assert all(values.sum().item() == pytest.approx(1.0) for values in shares)


def test_parts_of_the_balance_are_logged(whole: dict[str, Path]) -> None:
    records = metrics(whole["balanced"])
    assert [record["aux_loss"] for record in records if record["step"] in (1, 6)] == pytest.approx([1.0, 1.0])
    for record in records:
        task = record.get("mlm_loss", 0.0) + record.get("ar_loss", 0.0) + record.get("answer_loss", 0.0)
        parts = 0.01 * record["aux_loss"] + 0.001 * record["z_loss"]
        assert record["loss"] == pytest.approx(task + parts, rel=1e-6)
        assert record["expert_bias_span"] > 0 or record["step"] == 1
        assert record["z_loss"] > 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["2 expert ranks", "balanced"])
def test_its_checkpoint_is_evaluated_in_one_process(whole: dict[str, Path], name: str) -> None:
    for record in evaluations(whole[name]):
        folder = checkpoints(whole[name])[record["step"]]
        found = evaluate_checkpoint(folder)
        for key, value in found.items():
            if isinstance(value, float):
                assert value == pytest.approx(record[key], rel=1e-5), key


@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_starts_from_weights_of_another_mesh(
    datasets: Datasets, whole: dict[str, Path], tmp_path: Path, frozen: bool
) -> None:
    """A frozen decoder is written back bit by bit, each expert once."""
    stage = "{name: smat, steps: 2" + (", frozen: [decoder]}" if frozen else "}")
    settings = SETTINGS | SPREAD | {"stages": f"[{stage}]", "optimizer.warmup_steps": 1}
    command = [*arguments(datasets, "new", settings), "--init-from", str(whole["1 rank"])]
    run_ranks(2, command, tmp_path).check()
    before = tensors(checkpoints(whole["1 rank"])[STEPS])
    after = tensors(checkpoints(tmp_path / "new")[2])
    names = [name for name in after if name.startswith("weight.decoder") and ".experts." in name]
    assert names
    assert all(torch.equal(after[name], before[name]) == frozen for name in names)
