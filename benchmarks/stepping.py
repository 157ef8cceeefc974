"""Optimizer steps as the trainer makes them, and the clocks that time them."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.plain_engine import PlainEngine
from benchmarks.profiling import Profile, profile_steps
from benchmarks.traffic import Traffic, counted_traffic
from rxt_dist.config import RunConfig, check_world_size, stage_optimizer
from rxt_dist.errors import TrainingError
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.kernels.compilation import set_compile
from rxt_dist.parallel.bootstrap import World, start_process_group, world_from_environment
from rxt_dist.parallel.collectives import sum_over_ranks
from rxt_dist.parallel.peers import set_peer_copies
from rxt_dist.stages import open_pieces
from rxt_dist.stages.flops import batch_flops
from rxt_dist.train.build import build_engine, build_module
from rxt_dist.train.engine import StageEngine
from rxt_dist.train.feed import Feed, open_feed
from rxt_dist.train.schedule import learning_rate

PHASES = ("data", "forward", "backward", "update", "other")
SPLIT_STEPS = 10
PROFILED_STEPS = 3
COUNTED_STEPS = 3
MIB = 1 << 20

Engine = StageEngine | PlainEngine
Mark = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What was measured of one stage."""

    stage: str
    deepspeed: bool
    tokens: float
    """Real tokens of a step over all ranks, mean."""
    seconds: list[float]
    """Of every measured step."""
    losses: list[float]
    """Of the same steps."""
    wait: float
    """Seconds of a step that the loop waited for the loader, median."""
    peak_bytes: int
    start: float
    """Seconds until the first measured step: building model and engine, compiling, warm-up."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of every phase, median of steps that wait for the device after each; empty if not measured."""
    flops_per_token: float | None = None
    """Of all ranks; None if not measured."""
    profile: Profile | None = None
    traffic: Traffic | None = None
    """What this rank sent in :data:`COUNTED_STEPS` more steps; None if not measured."""

    @property
    def step(self) -> float:
        """Seconds of a step, median."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def gap(self) -> float | None:
        """Seconds of a step in which the GPU waits for the host; None without a GPU's profile."""
        if self.profile is None or self.profile.busy is None:
            return None
        return max(0.0, self.step - self.profile.busy)


class Loop:
    """The training loop of a stage without log lines, checkpoints and evaluation."""

    def __init__(self, config: RunConfig, index: int, world: World, engine: Engine, feed: Feed) -> None:
        self.config, self.stage, self.world = config, config.stages[index], world
        self.engine, self.feed = engine, feed
        self._optimizer = stage_optimizer(config, self.stage)
        self._number = 0
        self.tokens = 0
        self.waits: list[float] = []
        self.losses: list[torch.Tensor] = []
        self.count_flops = False
        self.flops = 0

    def step(self, mark: Mark = lambda phase: None) -> None:
        """One optimizer step; ``mark`` hears the end of each phase but ``backward`` (:func:`on_backward`)."""
        rates = {
            start: learning_rate(self._optimizer, self._number, self.stage.steps, start)
            for start in self.engine.group_starts
        }
        self.engine.begin_step(self._number, rates)
        data = self.feed.next_step()
        self.tokens += data.counts["tokens"]
        self.waits.append(data.wait_seconds)
        shares = []
        for batch in data.batches:
            on_device = batch.to(self.world.device, non_blocking=True)
            mark("data")
            loss, metrics, stm = self.engine.forward(on_device, data.counts, self.feed.stm(batch))
            mark("forward")
            self.engine.backward_and_step(loss)
            mark("update")
            self.feed.carry(batch, stm)
            shares.append(metrics[0])
            mark("other")
            if self.count_flops:
                trains = self.engine.module.trains
                self.flops += batch_flops(self.config, self.stage, batch, trains).total
        self.engine.end_step()
        self.losses.append(torch.stack(shares).sum())
        self._number += 1

    def restart(self) -> None:
        """Forget what was counted."""
        self.tokens = self.flops = 0
        self.waits, self.losses = [], []


def on_backward(engine: Engine, action: Callable[[], None]) -> None:
    """Call ``action`` at the end of the backward pass, inside of ``backward_and_step``."""
    owner: Any = engine.engine if isinstance(engine, StageEngine) else engine
    inner = owner.backward

    def backward(*arguments: Any, **options: Any) -> Any:
        result = inner(*arguments, **options)
        action()
        return result

    owner.backward = backward


def time_steps(loop: Loop, count: int) -> list[float]:
    """Seconds of every step, on the GPU's own clock where there is one: nothing waits before the end."""
    on_gpu = loop.world.device.type == "cuda"

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    synchronise(loop.world.device)
    times = [now()]
    for _ in range(count):
        loop.step()
        times.append(now())
    synchronise(loop.world.device)
    spans = pairwise(times)
    return [before.elapsed_time(after) / 1e3 if on_gpu else after - before for before, after in spans]


def time_phases(loop: Loop, count: int) -> dict[str, float]:
    """Seconds of every phase, median over ``count`` steps in which the host waits after each phase."""
    device = loop.world.device
    steps: list[dict[str, float]] = []
    last = 0.0

    def mark(phase: str) -> None:
        nonlocal last
        synchronise(device)
        now = time.perf_counter()
        steps[-1][phase] += now - last
        last = now

    ready = True
    on_backward(loop.engine, lambda: mark("backward") if ready else None)
    for _ in range(count):
        steps.append(dict.fromkeys(PHASES, 0.0))
        synchronise(device)
        last = time.perf_counter()
        loop.step(mark)
    ready = False
    return {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """GPU memory allocated at most since the stage began, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    config: RunConfig,
    index: int,
    world: World,
    *,
    steps: int,
    warmup: int,
    deepspeed: bool = True,
    split: bool = False,
    profile: bool = False,
    trace: Path | None = None,
    traffic: bool = False,
) -> Result:
    """Train a fresh model in stage number ``index`` and time the steps after the warm-up. Collective.

    The rate and the memory come from ``steps`` steps that nothing disturbs. With ``split`` more steps follow,
    which divide their time into phases, count operations and, on a GPU or with ``profile``, kernels, all of
    which are written to ``trace``. With ``traffic`` yet more follow, in which what the rank sends is counted.

    Raises:
        TrainingError: a loss is not finite.
    """
    began = time.perf_counter()
    stage = config.stages[index]
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    source = open_pieces(config, stage, "train")
    engine: Engine
    if deepspeed:
        engine = build_engine(config, stage, world)
    else:
        engine = PlainEngine(config, stage, world, build_module(config, stage, world)[1].to(world.device))
    try:
        with open_feed(config, stage, index, source, world, None) as feed:
            loop = Loop(config, index, world, engine, feed)
            for _ in range(warmup):
                loop.step()
            loop.restart()
            synchronise(world.device)
            start = time.perf_counter() - began
            seconds = time_steps(loop, steps)
            result = partial(
                Result,
                stage.name,
                deepspeed,
                loop.tokens / steps,
                seconds,
                _losses(loop),
                statistics.median(loop.waits),
                peak_bytes(world.device),
                start,
            )
            found = result(*_split(loop, steps, profile, trace)) if split else result()
            return replace(found, traffic=_traffic(loop)) if traffic else found
    finally:
        engine.close()


def _losses(loop: Loop) -> list[float]:
    losses = sum_over_ranks(torch.stack(loop.losses).double())
    if not torch.isfinite(losses).all():
        raise TrainingError("the loss is not finite: the times would mean nothing")
    found: list[float] = losses.tolist()
    return found


def _traffic(loop: Loop) -> Traffic:
    # Compiled code calls the process groups from C++, where nobody counts.
    with torch.compiler.set_stance("force_eager"), counted_traffic() as traffic:
        for _ in range(COUNTED_STEPS):
            loop.step()
        synchronise(loop.world.device)
    return traffic


def _split(
    loop: Loop, steps: int, profile: bool, trace: Path | None
) -> tuple[dict[str, float], float, Profile | None]:
    """Phases, operations a token, and kernels."""
    loop.restart()
    loop.count_flops = True
    phases = time_phases(loop, min(steps, SPLIT_STEPS))
    loop.count_flops = False
    flops = torch.tensor(float(loop.flops), dtype=torch.float64, device=loop.world.device)
    per_token = float(sum_over_ranks(flops)) / loop.tokens
    if not profile and loop.world.device.type != "cuda":
        return phases, per_token, None
    kernels = profile_steps(loop.step, min(steps, PROFILED_STEPS), loop.world.device, trace)
    return phases, per_token, kernels


@contextmanager
def process_group(config: RunConfig) -> Iterator[tuple[World, str]]:
    """The ranks that were launched, and the attention backend that they chose."""
    world = world_from_environment()
    check_world_size(config, world.size)
    world = replace(world, tensor_size=config.parallel.tensor_size)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    set_compile(config.runtime.compile, with_messages=config.parallel.tensor_size > 1)
    set_peer_copies(config.runtime.peer_copies)
    backend = set_attention_backend(config.runtime.attention_backend, world.device, dtype)
    start_process_group(world, config.runtime.collective_timeout_seconds)
    try:
        yield world, backend
    finally:
        dist.destroy_process_group()
