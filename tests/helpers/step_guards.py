"""Steps of real engines on random data, for tests of how a step runs and not of what it learns."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.stepping import Loop
from benchmarks.workload import datasets, read_config
from rxt_dist.config import RunConfig
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.kernels.compilation import set_compile
from rxt_dist.parallel.bootstrap import World, start_process_group
from rxt_dist.stages import open_pieces
from rxt_dist.train.build import build_engine
from rxt_dist.train.feed import open_feed

STAGES = ("joint_lm", "interaction_sft", "memory_attention", "smat")
SMALL = (
    "model.seq_len=64",
    "batch.packs=4",
    "batch.pack_tokens=128",
    "batch.micro_packs=2",
    "batch.lanes=8",
    "batch.micro_lanes=4",
)
"""A step of a few micro-batches, for the run ``tiny``."""


@contextmanager
def one_rank(device: torch.device) -> Iterator[World]:
    """This process as a run of one rank, in the process group that it has or in one of its own."""
    world = World(0, 0, 1, device)
    joins = dist.is_initialized()
    start_process_group(world, 600)
    try:
        yield world
    finally:
        if not joins:
            dist.destroy_process_group()


@contextmanager
def prepared(overrides: Sequence[str], folder: Path, world: World) -> Iterator[RunConfig]:
    """The run ``tiny`` with ``overrides`` and random datasets of lengths that differ."""
    config, stages = read_config("tiny", [*SMALL, *overrides], None)
    arguments = argparse.Namespace(lengths=["12", "64"], interactions=3, folder=folder)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    set_compile(config.runtime.compile)
    set_attention_backend(config.runtime.attention_backend, world.device, dtype)
    with datasets(config, stages, world, 40, arguments) as run:
        yield run


@contextmanager
def loop_of(config: RunConfig, name: str, world: World) -> Iterator[Loop]:
    """The loop of a stage over a fresh model."""
    index = STAGES.index(name)
    stage = config.stages[index]
    engine = build_engine(config, stage, world)
    try:
        with open_feed(config, stage, index, open_pieces(config, stage, "train"), world, None) as feed:
            yield Loop(config, index, world, engine, feed)
    finally:
        engine.close()


def losses_of(loop: Loop, steps: int) -> list[float]:
    """Losses of the next ``steps`` steps."""
    loop.restart()
    for _ in range(steps):
        loop.step()
    found: list[float] = torch.stack(loop.losses).tolist()
    return found
