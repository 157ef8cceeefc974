"""bf16 on the CPU: fp32 masters survive a restart, which changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, checkpoints, metrics, tensors, untimed

STEPS = 5
SETTINGS = SMALL | {
    "precision": "bf16",
    "stages": "[{name: joint_lm, steps: 3}, {name: interaction_sft, steps: 2}]",
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 100,
}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks": (2, {}),
    "2 ranks, ZeRO 2, accumulation": (2, {"zero.stage": 2, "batch.micro_packs": 1}),
}


@pytest.mark.parametrize(
    "mesh", [pytest.param("2 ranks", marks=pytest.mark.slow), "2 ranks, ZeRO 2, accumulation"]
)
def test_a_bf16_run_resumes_bit_by_bit(datasets: Datasets, tmp_path: Path, mesh: str) -> None:
    ranks, settings = MESHES[mesh]
    command = arguments(datasets, "run", SETTINGS | settings)
    run_ranks(ranks, command, tmp_path).check()
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)

    shutil.copytree(whole, tmp_path / "run")
    for step, path in checkpoints(tmp_path / "run").items():
        if step > 2:
            shutil.rmtree(path)
    result = run_ranks(ranks, [*command, "--resume"], tmp_path).check()
    assert "from step 2" in result.output
    assert untimed(metrics(tmp_path / "run")) == untimed(metrics(whole))
    found, expected = tensors(checkpoints(tmp_path / "run")[STEPS]), tensors(checkpoints(whole)[STEPS])
    assert [name for name, values in found.items() if not torch.equal(values, expected[name])] == []

    assert all(values.dtype == torch.float32 for values in expected.values())
    trained = {name for name in expected if name.startswith("exp_avg.")}
    for name in (f"weight.{name.removeprefix('exp_avg.')}" for name in trained):
        rounded = expected[name].bfloat16().float()
        assert not torch.equal(rounded, expected[name]), f"{name} was rounded to bf16"


def test_bf16_computes_what_fp32_does_up_to_rounding(datasets: Datasets, tmp_path: Path) -> None:
    records = {}
    for precision in ("fp32", "bf16"):
        settings = SETTINGS | {"precision": precision}
        run_ranks(1, arguments(datasets, precision, settings), tmp_path).check()
        records[precision] = metrics(tmp_path / precision)
    for exact, rounded in zip(records["fp32"], records["bf16"], strict=True):
        assert rounded["tokens"] == exact["tokens"]
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.01)
    assert records["bf16"][0]["loss"] != records["fp32"][0]["loss"]
