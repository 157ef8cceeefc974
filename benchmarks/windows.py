"""Speed and memory of a memory stage by the length of its window, with and without recomputation.

    python benchmarks/windows.py --config tiny
    python benchmarks/windows.py --config micro-chat --stage 3 --windows 1 4 16 --set batch.lanes=64
    deepspeed --num_gpus 2 benchmarks/windows.py --config alpha

Every window trains a fresh model on random conversations, as benchmarks/train_step.py does. Memory is the
most that the GPU had allocated during the steps, weights and optimizer included; without a GPU it is what the
graph of one micro-batch keeps for the backward pass, without the weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A launcher starts this file by its path: make the packages importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.devices import device_name
from benchmarks.stepping import MIB, measure, process_group
from benchmarks.workload import add_arguments, datasets, possible_lengths, read_config
from rxt_dist.arguments import add_overrides
from rxt_dist.config import RunConfig
from rxt_dist.errors import ConfigError, exit_with_message
from rxt_dist.parallel.bootstrap import World
from rxt_dist.stages import open_pieces
from rxt_dist.train.build import build_module
from rxt_dist.train.feed import open_feed

RECOMPUTE = ("none", "interaction")


def kept_bytes(config: RunConfig, index: int, world: World) -> int:
    """Bytes that the graph of the second step's first micro-batch keeps for the backward pass. Collective."""
    _, module = build_module(config, config.stages[index], world)
    module.freeze()
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(values: torch.Tensor) -> torch.Tensor:
        storage = values.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return values

    source = open_pieces(config, config.stages[index], "train")
    with open_feed(config, config.stages[index], index, source, world, None) as feed:
        for batch in feed.next_step().batches:
            with torch.no_grad():
                feed.carry(batch, module.run(batch, feed.stm(batch))[1])
        data = feed.next_step()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            module(data.batches[0], data.counts, feed.stm(data.batches[0]))
    return sum(kept.values())


def line(config: RunConfig, index: int, world: World, arguments: argparse.Namespace) -> str:
    """One row of the table. Collective."""
    result = measure(config, index, world, steps=arguments.steps, warmup=arguments.warmup)
    memory = result.peak_bytes if world.device.type == "cuda" else kept_bytes(config, index, world)
    return (
        f"{config.batch.window:>6}  {config.runtime.recompute:<12}{result.tokens:>12,.0f}"
        f"{result.tokens_per_second:>12,.0f}{result.step * 1e3:>10.1f}{memory / MIB:>12,.1f}"
    )


def variants(config: RunConfig, windows: Sequence[int]) -> list[RunConfig]:
    """The run with every window, each without and with recomputation."""
    return [
        config.model_copy(
            update={
                "batch": config.batch.model_copy(update={"window": window}),
                "stages": [stage.model_copy(update={"window": None}) for stage in config.stages],
                "runtime": config.runtime.model_copy(update={"recompute": recompute}),
            }
        )
        for window in windows
        for recompute in RECOMPUTE
    ]


def choose_stage(config: RunConfig, stages: Sequence[int]) -> int:
    """The one that --stage numbers, or the last memory stage of the run."""
    found = [index for index in stages if config.stages[index].uses_lanes]
    if not found:
        raise ConfigError(f"--stage: {config.stages[stages[-1]].name} has no windows; choose a memory stage")
    return found[-1]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="run file or name of a packaged one (%(default)s)")
    parser.add_argument("--stage", type=int, metavar="INDEX", help="default: the last memory stage")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (%(default)s)")
    add_overrides(parser, "batch.lanes=64")
    add_arguments(parser)
    parser.set_defaults(interactions=12)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.interactions, *arguments.windows) < 1 or arguments.warmup < 0:
        parser.error("--steps, --interactions and --windows must be 1 or more, --warmup 0 or more")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    config, stages = read_config(arguments.config, arguments.overrides, arguments.stage)
    possible_lengths(arguments, config.model.seq_len)
    index = choose_stage(config, stages)
    largest = variants(config, [max(arguments.windows)])[0]
    steps = arguments.steps + arguments.warmup
    with (
        process_group(config) as (world, backend),
        datasets(largest, [index], world, steps, arguments) as prepared,
    ):
        if world.is_main:
            stage, lanes = prepared.stages[index].name, prepared.batch.lanes
            print(f"{device_name(world.device)}; ranks: {world.size}; torch {torch.__version__}")
            print(f"{prepared.model.name}, {prepared.precision}, {backend}, {stage}: {lanes} lanes\n")
            print(f"{'window':>6}  {'recompute':<12}{'tokens/step':>12}{'tokens/s':>12}", end="")
            print(f"{'step ms':>10}{'memory MiB':>12}", flush=True)
        for variant in variants(prepared, arguments.windows):
            row = line(variant, index, world, arguments)
            if world.is_main:
                print(row, flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return exit_with_message(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
