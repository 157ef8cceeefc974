"""Configuration: the schema of models and runs, and how it is read, checked and handed to DeepSpeed."""

from rxt_dist.config.dataset import resolve_dataset
from rxt_dist.config.deepspeed import deepspeed_config
from rxt_dist.config.load import CONFIG_FOLDER, available, load_config, load_model_config, save_resolved
from rxt_dist.config.mesh import accumulation_steps, check_world_size, micro_units
from rxt_dist.config.model import (
    AttentionConfig,
    DecoderConfig,
    EncoderConfig,
    GateConfig,
    MemoryAttentionConfig,
    ModelConfig,
    MoEConfig,
    SpecialTokens,
    StmInitConfig,
)
from rxt_dist.config.run import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MetricsConfig,
    ParallelConfig,
    PrometheusConfig,
    RunConfig,
    RuntimeConfig,
    ZeroConfig,
    stage_optimizer,
)
from rxt_dist.config.stage import STAGE_DATA, OptimizerConfig, OptimizerOverrides, StageConfig, UnfreezeConfig

__all__ = [
    "CONFIG_FOLDER",
    "STAGE_DATA",
    "AttentionConfig",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "GateConfig",
    "MemoryAttentionConfig",
    "MetricsConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OptimizerOverrides",
    "ParallelConfig",
    "PrometheusConfig",
    "RunConfig",
    "RuntimeConfig",
    "SpecialTokens",
    "StageConfig",
    "StmInitConfig",
    "UnfreezeConfig",
    "ZeroConfig",
    "accumulation_steps",
    "available",
    "check_world_size",
    "deepspeed_config",
    "load_config",
    "load_model_config",
    "micro_units",
    "resolve_dataset",
    "save_resolved",
    "stage_optimizer",
]
