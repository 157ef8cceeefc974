"""A short run of a text and a memory stage, resumed and compared on different meshes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import arguments, checkpoints, metrics, relative, tensors, trainer_state, untimed

STEPS, SAVED = 10, [2, 4, 5, 6, 8, 10]
SETTINGS: dict[str, Any] = {
    "batch.packs": 4,
    "batch.pack_tokens": 64,
    "batch.lanes": 4,
    "evaluation.max_packs": 3,
    "evaluation.max_conversations": 6,
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 4,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 100,
    "stages": "[{name: joint_lm, steps: 5}, {name: smat, steps: 5, unfreeze: {decoder: 2}}]",
}


def resumed(
    datasets: Datasets, folder: Path, start: Path, step: int, ranks: int, own: dict[str, Any]
) -> Path:
    """What becomes of a run whose newest checkpoint is the one of ``step``."""
    run_dir = folder / "run"
    shutil.copytree(start, run_dir)
    for number, path in checkpoints(run_dir).items():
        if number > step:
            shutil.rmtree(path)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    run_ranks(ranks, [*arguments(datasets, "run", SETTINGS | own), "--resume"], folder).check()
    return run_dir


def assert_same_path(ours: Path, theirs: Path) -> None:
    """Every logged number, weights and moments of the end, up to rounding."""
    for own, reference in zip(untimed(metrics(ours)), untimed(metrics(theirs)), strict=True):
        assert own.keys() == reference.keys()
        for name, value in reference.items():
            if isinstance(value, float):
                assert relative(own[name], value) <= 1e-5, (own["step"], name)
            else:
                assert own[name] == value, (own["step"], name)
    found, expected = (tensors(checkpoints(folder)[STEPS]) for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        error = (values - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-2)
        assert error <= 5e-4, (name, float(error))
    assert trainer_state(checkpoints(ours)[STEPS]) == trainer_state(checkpoints(theirs)[STEPS])
