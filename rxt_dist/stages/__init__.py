"""Training objectives. Each stage name maps to its module class and to the data it reads."""

from __future__ import annotations

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.config.run import STAGE_DATA, StageName
from rxt_dist.data.manifest import Split
from rxt_dist.data.mixing import MixedPieces
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError
from rxt_dist.model import RxTModel
from rxt_dist.stages.base import StageModule, Term
from rxt_dist.stages.context import ContextModule
from rxt_dist.stages.memory_attention import MemoryAttentionModule
from rxt_dist.stages.smat import SmatModule
from rxt_dist.stages.text import TextStageModule

__all__ = ["Pieces", "StageModule", "Term", "TextStageModule", "build_stage", "open_pieces"]

Pieces = TextPieces | InteractionPieces | MixedPieces

_MODULES: dict[StageName, type[TextStageModule | ContextModule | MemoryAttentionModule | SmatModule]] = {
    "joint_lm": TextStageModule,
    "interaction_sft": TextStageModule,
    "context_sft": ContextModule,
    "memory_attention": MemoryAttentionModule,
    "smat": SmatModule,
}


def build_stage(model: RxTModel, config: RunConfig, stage: StageConfig) -> StageModule:
    """The stage's module over the parts of ``model`` that it uses."""
    return _MODULES[stage.name](model, config, stage)


def open_pieces(config: RunConfig, stage: StageConfig, split: Split) -> Pieces:
    """Training units of ``split`` in the dataset or datasets the stage reads.

    Raises :class:`ConfigError` when no dataset is set, DataError when one lacks the split.
    """
    kind = STAGE_DATA[stage.name]
    datasets = config.data.datasets(kind)
    if not datasets:
        raise ConfigError(f"data.{kind} is not set; stage {stage.name} needs it")
    if stage.uses_lanes and len(datasets) > 1:
        raise ConfigError(f"data.{kind}: found {len(datasets)} datasets, stage {stage.name} reads only one")
    pieces_of = TextPieces if kind == "text" else InteractionPieces
    skip = config.data.on_corrupt == "skip"
    parts = [
        pieces_of(Dataset(dataset.path, split, skip_corrupt=skip), config.model.seq_len)
        for dataset in datasets
    ]
    if len(parts) == 1:
        return parts[0]
    return MixedPieces(parts, [dataset.weight for dataset in datasets])
