"""Training objectives. Each stage name maps to its module class and to the data it reads."""

from __future__ import annotations

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.data.manifest import Split
from rxt_dist.data.pieces import InteractionPieces, PieceSource, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError
from rxt_dist.model import RxTModel
from rxt_dist.stages.base import StageModule, Term
from rxt_dist.stages.text import TextStageModule

__all__ = ["StageModule", "Term", "build_stage", "open_pieces"]


def build_stage(model: RxTModel, config: RunConfig, stage: StageConfig) -> StageModule:
    """The stage's module over the parts of ``model`` that it uses."""
    return TextStageModule(model, config, stage)


def open_pieces(config: RunConfig, stage: StageConfig, split: Split) -> PieceSource:
    """Training units of ``split`` (``train`` or ``val``) in the dataset the stage reads."""
    text = stage.name == "joint_lm"
    path = config.data.text if text else config.data.conversations
    if path is None:
        field = "data.text" if text else "data.conversations"
        raise ConfigError(f"{field} is not set; stage {stage.name} needs it")
    dataset = Dataset(path, split)
    return (
        TextPieces(dataset, config.model.seq_len)
        if text
        else InteractionPieces(dataset, config.model.seq_len)
    )
