"""Engines on the ranks of a gloo group, without data, loop or checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from rxt_dist.config import RunConfig, deepspeed_config, stage_optimizer
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import RxTModel
from rxt_dist.parallel.bootstrap import configure_deepspeed
from rxt_dist.stages import build_stage
from rxt_dist.train.engine import StageEngine


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that exists already; before any engine."""
    configure_deepspeed()
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)


def start_engine(config: RunConfig, model: RxTModel, changes: dict[str, Any] | None = None) -> StageEngine:
    """The engine of the run's first stage; ``changes`` replace top-level keys of its DeepSpeed settings."""
    stage = config.stages[0]
    optimizer = stage_optimizer(config, stage)
    dp_size = dist.get_world_size() // config.parallel.tensor_size
    settings = deepspeed_config(config, stage, dp_size=dp_size, optimizer=optimizer)
    settings |= changes or {}
    return StageEngine(model, build_stage(model, config, stage), settings, torch.device("cpu"))


def state_bytes(engine: StageEngine) -> dict[str, int]:
    """Bytes that this rank holds, by what for, from the engine's own tensors."""
    zero, weights = engine.engine.optimizer, list(engine.engine.module.parameters())
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3
        masters = zero.fp32_partitioned_groups_flat
        if kept := zero.persistent_parameters:  # as after every step
            kept[0].all_gather(kept)
        weights = [tensor for p in weights for tensor in (p.data, p.ds_tensor)]
    else:
        masters = zero.single_partition_of_fp32_groups
    state = [zero.optimizer.state[flat] for flat in masters]
    moments = [one[name] for one in state for name in ("exp_avg", "exp_avg_sq")]
    optimizer = sum(t.numel() * t.element_size() for t in (*masters, *moments))
    gradients = sum(flat.grad.numel() * flat.grad.element_size() for flat in masters if flat.grad is not None)
    offloaded = getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
    return {
        "weights": sum(t.numel() * t.element_size() for t in weights),
        "optimizer": 0 if offloaded else optimizer,
        "host_optimizer": optimizer + gradients if offloaded else 0,
    }
