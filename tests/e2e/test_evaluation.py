"""Evaluations look at the model alone, not at what disturbs its training."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, evaluations, metrics

# The weights hardly move, so that both runs evaluate the same model.
SETTINGS = SMALL | {
    "stages": "[{name: joint_lm, steps: 2}]",
    "optimizer.lr": 1e-30,
    "evaluation.samples": 2,
    "evaluation.max_packs": 5,
}


def test_noise_and_dropout_are_off(datasets: Datasets, tmp_path: Path) -> None:
    disturbed = {"stages.0.noise_level": 10.0, "stages.0.slot_dropout": 0.9}
    run_ranks(2, arguments(datasets, "clean", SETTINGS), tmp_path).check()
    run_ranks(2, arguments(datasets, "disturbed", SETTINGS | disturbed), tmp_path).check()
    clean, other = (metrics(tmp_path / name)[0] for name in ("clean", "disturbed"))
    assert abs(clean["ar_loss"] - other["ar_loss"]) > 5e-5, "training was not disturbed"
    (expected,), (found,) = (evaluations(tmp_path / name) for name in ("clean", "disturbed"))
    for key in ("loss", "mlm_loss", "ar_loss", "mlm_accuracy", "ar_accuracy", "aux_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-7), key
    assert found["samples"] == expected["samples"]
