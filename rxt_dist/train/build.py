"""From a configuration to the module and the engine of one stage, for training and for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from rxt_dist.config import RunConfig, StageConfig, deepspeed_config, stage_optimizer
from rxt_dist.model import RxTModel, build_model
from rxt_dist.parallel.bootstrap import World
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import parallelize
from rxt_dist.stages import StageModule, build_stage
from rxt_dist.train.engine import StageEngine


def build_module(
    config: RunConfig, stage: StageConfig, world: World, load: Callable[[RxTModel], None] | None = None
) -> tuple[RxTModel, StageModule]:
    """This rank's part of the model, in fp32, and the stage over it, on the host.

    ``load`` may replace the fresh weights.
    """
    mesh = Mesh(world.size, **config.parallel.model_dump())
    model = build_model(config.model, config.seed, lambda whole: parallelize(whole, mesh, world.rank))
    if load is not None:
        load(model)
    module = build_stage(model, config, stage)
    return model, module


def build_engine(
    config: RunConfig, stage: StageConfig, world: World, load: Callable[[RxTModel], None] | None = None
) -> StageEngine:
    """The engine of a stage on this rank; for ``load`` see :func:`build_module`. Collective."""
    model, module = build_module(config, stage, world, load)
    optimizer = stage_optimizer(config, stage)
    fused = world.device.type == "cuda"
    settings = deepspeed_config(config, stage, dp_size=world.dp_size, optimizer=optimizer, fused=fused)
    return StageEngine(model, module, settings, world.device)
