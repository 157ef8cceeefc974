"""Arguments of small runs, and what a run leaves in its folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

# Wall times are the only values that two equal runs do not share.
TIMES = ("tokens_per_second", "step_seconds")

TEXT_STAGES = "[{name: joint_lm, steps: 5}, {name: interaction_sft, steps: 5}]"
SMALL = {
    "batch.packs": 4,
    "batch.pack_tokens": 64,
    "stages": TEXT_STAGES,
    "evaluation.max_packs": 3,
    "evaluation.max_conversations": 6,
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 4,
}
"""Settings that make a run of ``tiny`` short: 5 steps of each of the two text stages."""

CUT: dict[str, Any] = {
    "zero.stage": 3,
    "deepspeed.zero_optimization": "{stage3_param_persistence_threshold: 700, stage3_max_reuse_distance: 0, "
    "stage3_prefetch_bucket_size: 2000}",
}
"""ZeRO 3 that cuts weights of ``tiny`` too: most of so small a model would stay whole on every rank."""
OFFLOADED: dict[str, Any] = {"zero.offload_optimizer": "cpu"}


def arguments(
    datasets: Datasets, run_dir: Path | str, settings: dict[str, Any] | None = None, config: str = "tiny"
) -> list[str]:
    """The command line of a run of ``config`` without exporter, with ``settings`` as overrides."""
    values = {
        "data.text": datasets.text,
        "data.conversations": datasets.conversations,
        "runtime.run_dir": run_dir,
        "metrics.prometheus.enabled": "false",
        **(settings or {}),
    }
    overrides = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["--config", config, *overrides]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; fails on a line that is not whole."""
    content = file.read_text(encoding="utf-8")
    assert content.endswith("\n"), f"{file}: the last line has no end"
    return [json.loads(line) for line in content.splitlines()]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without their wall times."""
    return [
        {key: value for key, value in record.items() if key not in (*TIMES, "seconds")} for record in records
    ]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_lines(run_dir / "metrics.jsonl")


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return read_lines(run_dir / "eval.jsonl")


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Finished checkpoints by step, ascending."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if path.suffix != ".tmp"]
    return {int(path.name[5:]): path for path in sorted(found)}


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text())
    return state


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in their shapes, read with nothing but torch's own reader."""
    shapes = trainer_state(checkpoint)["tensor_shapes"]
    reader = FileSystemReader(checkpoint / "tensors")
    stored = reader.read_metadata().state_dict_metadata
    flat = {key: torch.full(tuple(entry.size), float("nan")) for key, entry in stored.items()}
    with warnings.catch_warnings():  # that it reads without a process group, as asked
        warnings.simplefilter("ignore")
        load(flat, storage_reader=reader, no_dist=True)
    return {key: values.view(shapes.get(key.partition(".")[2], -1)) for key, values in flat.items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below ``folder``, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def relative(ours: float, theirs: float) -> float:
    """Difference of two numbers relative to the larger."""
    return abs(ours - theirs) / max(abs(ours), abs(theirs), 1e-30)


def uninterrupted(
    datasets: Datasets,
    tmp_path_factory: pytest.TempPathFactory,
    ranks: int,
    settings: dict[str, Any],
    saved: list[int],
) -> Path:
    """Folder of a whole run on ``ranks`` ranks, which kept its checkpoints of the steps ``saved``."""
    folder = tmp_path_factory.mktemp(f"whole{ranks}")
    run_ranks(ranks, arguments(datasets, "run", settings), folder).check()
    assert list(checkpoints(folder / "run")) == saved
    return folder / "run"
