"""Training objectives. Each stage name maps to its module class and to the data it reads."""

from __future__ import annotations

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.config.stage import STAGE_DATA, StageName
from rxt_dist.data.conversations import MixedConversations
from rxt_dist.data.manifest import Split
from rxt_dist.data.mixing import MixedPieces
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.store import DatasetStore
from rxt_dist.errors import ConfigError
from rxt_dist.model import RxTModel
from rxt_dist.stages.base import StageModule, Term
from rxt_dist.stages.context import ContextModule
from rxt_dist.stages.memory_attention import MemoryAttentionModule
from rxt_dist.stages.smat import SmatModule
from rxt_dist.stages.text import TextStageModule

__all__ = ["Pieces", "StageModule", "Term", "TextStageModule", "build_stage", "dataset_store", "open_pieces"]

Pieces = TextPieces | InteractionPieces | MixedPieces | MixedConversations

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


def dataset_store(config: RunConfig) -> DatasetStore:
    """Where the stages of a run get their datasets from. Raises DataError for an unusable cache folder."""
    data = config.data
    return DatasetStore(
        cache_dir=data.cache_dir, cache_bytes=data.cache_bytes, skip_corrupt=data.on_corrupt == "skip"
    )


def open_pieces(
    config: RunConfig, stage: StageConfig, split: Split, store: DatasetStore | None = None
) -> Pieces:
    """Training units of ``split`` in the dataset or datasets the stage reads, which may be in ``store``.

    Raises :class:`ConfigError` when no dataset is set, DataError when one lacks the split.
    """
    kind = STAGE_DATA[stage.name]
    datasets = config.data.datasets(kind)
    if not datasets:
        raise ConfigError(f"data.{kind} is not set; stage {stage.name} needs it")
    store = store or dataset_store(config)
    opened = [store.dataset(dataset.path, split) for dataset in datasets]
    weights, seq_len = [dataset.weight for dataset in datasets], config.model.seq_len
    if kind == "text":
        texts = [TextPieces(dataset, seq_len) for dataset in opened]
        return MixedPieces(texts, weights) if len(texts) > 1 else texts[0]
    talks = [InteractionPieces(dataset, seq_len) for dataset in opened]
    return MixedConversations(talks, weights) if len(talks) > 1 else talks[0]
