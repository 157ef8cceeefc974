"""Speed and memory of optimizer steps, with the engine, the stages and the loaders that training uses.

    python benchmarks/train_step.py --config tiny
    python benchmarks/train_step.py --config micro --steps 50 --warmup 10 --set batch.pack_tokens=8192
    deepspeed --num_gpus 2 benchmarks/train_step.py --config alpha --stage 0

Every stage of the run file (or the one that --stage numbers) trains a fresh model on random tokens, which
are written into a temporary folder as real datasets. Times are medians over the measured steps of rank 0, on
the GPU's own clock where there is one, so the phases need not add up to the step:

    data      waiting for the loader, copying to the device
    forward   losses of all micro-batches
    backward  gradients, and as much of their reduction over the ranks as does not overlap
    update    the rest of the reduction, clipping, AdamW, gathering the weights
    other     carrying the memory of lanes
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# A launcher starts this file by its path: make the packages importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.data import write_dataset
from rxt_dist.arguments import add_overrides
from rxt_dist.config import (
    STAGE_DATA,
    DataConfig,
    RunConfig,
    StageConfig,
    check_world_size,
    deepspeed_config,
    load_config,
    resolve_dataset,
    stage_optimizer,
)
from rxt_dist.data.format import ConversationTokens
from rxt_dist.data.tokens import ANSWER, BOS, EOS, QUERY, SPECIAL_TOKENS
from rxt_dist.errors import ConfigError, TrainingError, exit_with_message
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import build_model
from rxt_dist.parallel.bootstrap import World, start_process_group, world_from_environment
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import parallelize
from rxt_dist.stages import build_stage, open_pieces
from rxt_dist.train.engine import StageEngine
from rxt_dist.train.feed import Feed, open_feed

PHASES = ("data", "forward", "backward", "update", "other")
IDS = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
SMALLEST_VOCABULARY = 512
SHORTEST = 8
MIB = 1 << 20


class Clock:
    """Ends of the phases of every step, on the device's clock where it has one (no synchronisation)."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[list[tuple[str, Any]]] = []

    def start_step(self) -> None:
        self._steps.append([("start", self._now())])

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to ``phase``."""
        self._steps[-1].append((phase, self._now()))

    def read(self) -> list[dict[str, float]]:
        """Seconds of every phase of every step; forgets them."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        result = []
        for marks in steps:
            seconds = dict.fromkeys(PHASES, 0.0)
            for (_, before), (phase, after) in pairwise(marks):
                seconds[phase] += self._seconds(before, after)
            result.append(seconds)
        return result

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, before: Any, after: Any) -> float:
        return float(before.elapsed_time(after) / 1e3 if self._on_gpu else after - before)


@dataclass(frozen=True)
class Result:
    """What was measured of one stage."""

    stage: StageConfig
    tokens: float
    """Real tokens of a step over all ranks, mean."""
    steps: list[dict[str, float]]
    """Seconds of every phase, by step."""
    peak_bytes: int

    def line(self) -> str:
        step = statistics.median(sum(seconds.values()) for seconds in self.steps)
        phases = [statistics.median(seconds[phase] for seconds in self.steps) for phase in PHASES]
        return (
            f"{self.stage.name:<18}{self.tokens:>12,.0f}{self.tokens / step:>12,.0f}{step * 1e3:>10.1f}"
            + "".join(f"{seconds * 1e3:>10.1f}" for seconds in phases)
            + f"{self.peak_bytes / MIB:>10,.0f}"
        )


def header() -> str:
    columns = "".join(f"{phase:>10}" for phase in ("step", *PHASES))
    units = "".join(f"{'ms':>10}" for _ in ("step", *PHASES))
    return (
        f"{'stage':<18}{'tokens/step':>12}{'tokens/s':>12}{columns}{'memory':>10}\n{'':<42}{units}{'MiB':>10}"
    )


def train_steps(engine: StageEngine, feed: Feed, clock: Clock, device: torch.device, count: int) -> float:
    """``count`` optimizer steps as the trainer makes them; returns their mean number of tokens."""
    tokens = 0
    metrics = torch.zeros((), device=device)
    for _ in range(count):
        clock.start_step()
        data = feed.next_step()
        tokens += data.counts["tokens"]
        for batch in data.batches:
            on_device = batch.to(device, non_blocking=True)
            clock.mark("data")
            loss, metrics, stm = engine.forward(on_device, data.counts, feed.stm(batch))
            clock.mark("forward")
            engine.backward_and_step(loss)
            clock.mark("update")
            feed.carry(batch, stm)
            clock.mark("other")
    if not torch.isfinite(metrics).all():
        raise TrainingError("the loss is not finite: the times would mean nothing")
    return tokens / count


def mark_backward(engine: StageEngine, clock: Clock) -> None:
    """Let ``clock`` know when DeepSpeed's backward pass ends, inside of ``backward_and_step``."""
    inner = engine.engine.backward

    def backward(*arguments: Any, **options: Any) -> Any:
        result = inner(*arguments, **options)
        clock.mark("backward")
        return result

    engine.engine.backward = backward


def measure(config: RunConfig, index: int, world: World, arguments: argparse.Namespace) -> Result:
    """Train a fresh model in stage number ``index`` and time the steps after the warm-up."""
    stage = config.stages[index]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    mesh = Mesh(world.size, config.parallel.tensor_size, config.parallel.expert_size)
    model = build_model(config.model, config.seed, lambda whole: parallelize(whole, mesh, world.rank))
    module = build_stage(model, config, stage)
    settings = deepspeed_config(
        config,
        stage,
        dp_size=world.size,
        optimizer=stage_optimizer(config, stage),
        fused=world.device.type == "cuda",
    )
    source = open_pieces(config, stage, "train")
    engine = StageEngine(model, module, settings, world.device)
    clock = Clock(world.device)
    mark_backward(engine, clock)
    try:
        with open_feed(config, stage, index, source, world, None) as feed:
            if arguments.warmup:
                train_steps(engine, feed, clock, world.device, arguments.warmup)
            clock.read()
            tokens = train_steps(engine, feed, clock, world.device, arguments.steps)
        return Result(stage, tokens, clock.read(), peak_bytes(world.device))
    finally:
        engine.close()


def peak_bytes(device: torch.device) -> int:
    """GPU memory allocated at most since the stage began, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def documents(count: int, lengths: tuple[int, int], vocab_size: int) -> list[np.ndarray]:
    """``count`` documents of random tokens."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(lengths[0], lengths[1] + 1, count)
    words = (rng.integers(len(IDS), vocab_size, size - 2) for size in sizes)
    return [np.concatenate(([IDS[BOS]], tokens, [IDS[EOS]])) for tokens in words]


def conversations(
    count: int, interactions: int, lengths: tuple[int, int], vocab_size: int
) -> list[ConversationTokens]:
    """``count`` conversations of random tokens; half of the tokens of an interaction are its answer."""
    rng = np.random.default_rng(0)
    made = []
    for sizes in rng.integers(lengths[0], lengths[1] + 1, (count, interactions)):
        segments = []
        for size in sizes:
            words = rng.integers(len(IDS), vocab_size, size - 4)
            middle = len(words) // 2
            segments.append(np.concatenate(([IDS[BOS], IDS[QUERY]], words[:middle])))
            segments.append(np.concatenate(([IDS[ANSWER]], words[middle:], [IDS[EOS]])))
        made.append(ConversationTokens(segments, [1, 2] * interactions))
    return made


def write_datasets(
    folder: Path, config: RunConfig, stages: Sequence[int], arguments: argparse.Namespace
) -> None:
    """Datasets of the ``stages`` as ``folder/text`` and ``folder/conversations``, about as large as the
    steps need."""
    vocab_size = config.model.vocab_size
    assert isinstance(vocab_size, int)
    lengths = arguments.lengths or (max(SHORTEST, config.model.seq_len // 4), config.model.seq_len)
    steps = arguments.steps + arguments.warmup
    pieces = steps * config.batch.packs * config.batch.pack_tokens * 2 // sum(lengths)
    lanes = config.batch.lanes or 0
    pieces = max(pieces, steps * lanes * config.batch.window)
    kinds = {STAGE_DATA[config.stages[index].name] for index in stages}
    if "text" in kinds:
        items = documents(pieces, lengths, vocab_size)
        write_dataset(folder / "text", "text", items, vocab_size=vocab_size, special_tokens=IDS)
    if "conversations" in kinds:
        count = lanes + pieces // arguments.interactions
        talks = conversations(count, arguments.interactions, lengths, vocab_size)
        write_dataset(
            folder / "conversations", "conversations", talks, vocab_size=vocab_size, special_tokens=IDS
        )


@contextmanager
def datasets(
    config: RunConfig, stages: Sequence[int], world: World, arguments: argparse.Namespace
) -> Iterator[RunConfig]:
    """``config`` with datasets that rank 0 makes, and removes at the end."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) if world.is_main else nullcontext("") as temporary:
        if world.is_main:
            write_datasets(Path(temporary), config, stages, arguments)
        shared = [temporary]
        dist.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
        data = DataConfig(text=folder / "text", conversations=folder / "conversations")
        yield config.model_copy(update={"data": data})
        dist.barrier()


def read_config(arguments: argparse.Namespace) -> tuple[RunConfig, list[int]]:
    """The run with its vocabulary filled in, and the numbers of the stages to measure."""
    config = load_config(arguments.config, arguments.overrides, require_data=False)
    vocab_size = config.model.vocab_size
    if vocab_size == "auto":
        vocab_size = config.model.card_vocab_size or SMALLEST_VOCABULARY
    if vocab_size <= len(IDS):
        raise ConfigError(f"model.vocab_size: found {vocab_size}; valid here: {len(IDS) + 1} or more")
    stages = list(range(len(config.stages))) if arguments.stage is None else [arguments.stage]
    if not 0 <= stages[0] < len(config.stages):
        raise ConfigError(f"--stage: found {stages[0]}; valid: 0 to {len(config.stages) - 1}")
    return resolve_dataset(config, vocab_size=vocab_size, special_ids=IDS, tokenizer_sha256={}), stages


def describe(config: RunConfig, world: World, backend: str, arguments: argparse.Namespace) -> str:
    """Machine, versions, model and batch: what a number is worth nothing without."""
    from deepspeed import __version__ as deepspeed_version

    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' if threads > 1 else ''} a rank"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    model, batch = config.model, config.batch
    lanes = f", {batch.lanes} lanes, window {batch.window}" if batch.lanes else ""
    return "\n".join(
        (
            f"{device}; ranks: {world.size}; python {platform.python_version()}, torch {torch.__version__}, "
            f"deepspeed {deepspeed_version}",
            f"{model.name}: vocabulary {model.vocab_size}, {config.precision}, attention {backend}, "
            f"ZeRO {config.zero.stage}; {batch.packs} packs of {batch.pack_tokens} tokens{lanes}",
            f"{arguments.steps} steps after {arguments.warmup} of warm-up; memory is the peak of rank 0"
            + ("" if world.device.type == "cuda" else " since it started"),
            "",
            header(),
        )
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="run file or name of a packaged one (%(default)s)")
    parser.add_argument("--stage", type=int, metavar="INDEX", help="number of one stage (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (%(default)s)")
    add_overrides(parser, "batch.pack_tokens=8192")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="tokens of a document and of an interaction (default: seq_len / 4 to seq_len)",
    )
    parser.add_argument("--interactions", type=int, default=6, help="of a conversation (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the temporary datasets are written")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.warmup < 0 or arguments.interactions < 1:
        parser.error("--steps and --interactions must be 1 or more, --warmup 0 or more")
    if arguments.lengths is not None and not SHORTEST <= arguments.lengths[0] <= arguments.lengths[1]:
        parser.error(f"--lengths must be {SHORTEST} or more, and LEAST at most MOST")
    return arguments


@contextmanager
def process_group(config: RunConfig) -> Iterator[tuple[World, str]]:
    """The ranks that were launched, and the attention backend that they chose."""
    world = world_from_environment()
    check_world_size(config, world.size)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    backend = set_attention_backend(config.runtime.attention_backend, world.device, dtype)
    start_process_group(world, config.runtime.collective_timeout_seconds)
    try:
        yield world, backend
    finally:
        dist.destroy_process_group()


def run(arguments: argparse.Namespace) -> int:
    config, stages = read_config(arguments)
    with process_group(config) as (world, backend), datasets(config, stages, world, arguments) as prepared:
        if world.is_main:
            print(describe(prepared, world, backend, arguments), flush=True)
        for index in stages:
            result = measure(prepared, index, world, arguments)
            if world.is_main:
                print(result.line(), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return exit_with_message(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
