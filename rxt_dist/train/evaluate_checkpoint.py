"""Evaluate a finished or interrupted run by itself, on its own or on other held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rxt_dist.checkpoint import CheckpointReader, locate_checkpoint
from rxt_dist.config import RunConfig, StageConfig, load_config
from rxt_dist.data.manifest import Split
from rxt_dist.data.store import DatasetStore
from rxt_dist.data.tokens import load_tokenizer, tokenizer_sha256
from rxt_dist.errors import ConfigError
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import build_model
from rxt_dist.parallel.bootstrap import world_from_environment
from rxt_dist.stages import build_stage, dataset_store, open_pieces
from rxt_dist.train.datasets import open_datasets
from rxt_dist.train.evaluation import evaluate_stage
from rxt_dist.train.run_dir import CONFIG_FILE


def evaluate_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    split: Split = "val",
    stage_name: str | None = None,
    memory: bool = False,
) -> dict[str, Any]:
    """Evaluate the weights of ``path`` (a run or checkpoint folder) in this process.

    ``overrides`` change the run's configuration, for example ``data.conversations=DIR``; ``stage_name``
    chooses the stage whose evaluation is made, by default the one the checkpoint stands in. ``memory`` makes
    the evaluation of stage smat, whatever stages the run has. Returns what ``eval.jsonl`` holds of an
    evaluation. Raises ConfigError, DataError or CheckpointError.
    """
    reader = CheckpointReader(locate_checkpoint(path))
    config = load_config(reader.path / CONFIG_FILE, overrides)
    if memory:
        stage = _memory_stage(config)
    else:
        stage = _choose_stage(config, stage_name or reader.state.stage_name)
    store = dataset_store(config)
    _check_tokenizer(config, stage, store, reader.path)
    world = world_from_environment()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    set_attention_backend(config.runtime.attention_backend, world.device, dtype)
    model = build_model(config.model, config.seed)
    reader.load_weights(model)
    module = build_stage(model, config, stage).to(world.device, dtype)
    source = open_pieces(config, stage, split, store)
    results = evaluate_stage(module, source, config, stage, world, load_tokenizer(reader.path))
    return {"step": reader.state.step, "stage": stage.name, "split": split, **results}


def _choose_stage(config: RunConfig, name: str) -> StageConfig:
    found = [stage for stage in config.stages if stage.name == name]
    if not found:
        valid = ", ".join(dict.fromkeys(stage.name for stage in config.stages))
        raise ConfigError(f"--stage: found {name!r}; the stages of this run are: {valid}")
    return found[-1]


def _memory_stage(config: RunConfig) -> StageConfig:
    """The last smat stage of the run, or one with the default options."""
    if config.batch.lanes is None:
        raise ConfigError(
            "batch.lanes: not set in this run; give the number of conversations that are evaluated side by "
            "side, e.g. --set batch.lanes=32"
        )
    if config.data.conversations is None:
        raise ConfigError(
            "data.conversations: not set in this run; give a dataset with --set data.conversations=DIR"
        )
    found = [stage for stage in config.stages if stage.name == "smat"]
    return found[-1] if found else StageConfig(name="smat", steps=1)


def _check_tokenizer(config: RunConfig, stage: StageConfig, store: DatasetStore, checkpoint: Path) -> None:
    """The evaluated dataset must have been tokenised as the run's were."""
    opened = open_datasets(config.model_copy(update={"stages": [stage]}), store)
    for name, files in opened.items():
        if files.manifest.tokenizer_sha256 != tokenizer_sha256(checkpoint):
            raise ConfigError(
                f"data.{name}: {files.name} was made with another tokenizer than the run's; "
                f"shard it again with the tokenizer in {checkpoint}"
            )
