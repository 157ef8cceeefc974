"""Training objectives. Each stage name maps to its module class and to the data it reads."""

from __future__ import annotations

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.config.run import STAGE_DATA, StageName
from rxt_dist.data.manifest import Split
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError
from rxt_dist.model import RxTModel
from rxt_dist.stages.base import StageModule, Term
from rxt_dist.stages.memory_attention import MemoryAttentionModule
from rxt_dist.stages.smat import SmatModule
from rxt_dist.stages.text import TextStageModule

__all__ = ["Pieces", "StageModule", "Term", "TextStageModule", "build_stage", "open_pieces"]

Pieces = TextPieces | InteractionPieces

_MODULES: dict[StageName, type[TextStageModule | MemoryAttentionModule | SmatModule]] = {
    "joint_lm": TextStageModule,
    "interaction_sft": TextStageModule,
    "memory_attention": MemoryAttentionModule,
    "smat": SmatModule,
}


def build_stage(model: RxTModel, config: RunConfig, stage: StageConfig) -> StageModule:
    """The stage's module over the parts of ``model`` that it uses."""
    return _MODULES[stage.name](model, config, stage)


def open_pieces(config: RunConfig, stage: StageConfig, split: Split) -> Pieces:
    """Training units of ``split`` in the dataset the stage reads.

    Raises :class:`ConfigError` when the dataset is not set, DataError when it lacks the split.
    """
    kind = STAGE_DATA[stage.name]
    path = getattr(config.data, kind)
    if path is None:
        raise ConfigError(f"data.{kind} is not set; stage {stage.name} needs it")
    dataset = Dataset(path, split)
    if kind == "text":
        return TextPieces(dataset, config.model.seq_len)
    return InteractionPieces(dataset, config.model.seq_len)
