"""What the host costs a step: with next to nothing to compute, a step is all host.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --stage 3 --without-deepspeed
    python benchmarks/host_time.py --config micro --set zero.stage=2
    deepspeed --num_gpus 2 benchmarks/host_time.py --stage 0 --set parallel.expert_size=2

A step trains on one sequence of 64 tokens a rank. On a CPU the layers are as narrow as possible, and
attention is an operator that is called as flash-attn's are and computes nothing: times are for ratios on one
machine, and a GPU's launches come on top of them. On a GPU they are part of them: no step of the same layers
is faster, however fast the kernels are. Shown is rank 0; with several ranks it also waits for the others.

"longest" is the longest of all measured steps, the rest as in benchmarks/train_step.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.devices import device_name
from benchmarks.flash_stand_in import flash_stand_in, hollow_backward, hollow_forward
from benchmarks.plain_engine import check_plain
from benchmarks.stepping import PHASES, Result, measure, process_group
from benchmarks.workload import datasets, read_config
from rxt_dist.arguments import add_overrides
from rxt_dist.config import RunConfig
from rxt_dist.errors import exit_with_message
from rxt_dist.parallel.bootstrap import World, world_from_environment

TOKENS = 64
SHORT = (
    "precision=bf16",
    "runtime.compile=true",
    f"model.seq_len={TOKENS}",
    f"model.stm_size={TOKENS}",
    f"batch.pack_tokens={TOKENS}",
)
NARROW = (
    "model.embed_dim=32",
    "model.vocab_size=64",
    "model.encoder.ff_dim=8",
    "model.decoder.ff_dim=8",
    "model.decoder.moe.num_experts=2",
    "model.decoder.moe.top_k=1",
)
"""Rows of 16 bytes or more, as grouped products need them; few experts, as a CPU loops over them."""


def header(config: RunConfig, world: World, attention: str, arguments: argparse.Namespace) -> str:
    """What is measured, and the names of the columns."""
    return (
        f"{device_name(world.device)}; ranks: {world.size}; torch {torch.__version__}; {config.model.name}, "
        f"attention {attention}, ZeRO {config.zero.stage}; milliseconds, medians of {arguments.steps} steps "
        f"after {arguments.warmup} of warm-up\n\n"
        f"{'stage':<20}" + "".join(f"{name:>10}" for name in ("step", "longest", *PHASES))
    )


def line(result: Result) -> str:
    """One row of the table, milliseconds."""
    name = result.stage if result.deepspeed else "  without DeepSpeed"
    cells = [result.step, max(result.seconds), *(result.phases[phase] for phase in PHASES)]
    return f"{name:<20}" + "".join(f"{seconds * 1e3:>10.2f}" for seconds in cells)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="alpha", help="run file or name of a packaged one (%(default)s)")
    parser.add_argument("--stage", type=int, metavar="INDEX", help="number of one stage (default: all)")
    parser.add_argument("--steps", type=int, default=100, help="measured steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them (%(default)s)")
    parser.add_argument("--without-deepspeed", action="store_true", help="the same with PyTorch alone too")
    add_overrides(parser, "batch.micro_packs=1")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.warmup < 0:
        parser.error("--steps must be 1 or more, --warmup 0 or more")
    arguments.lengths, arguments.interactions, arguments.folder = [str(TOKENS), str(TOKENS)], 6, None
    return arguments


def run(arguments: argparse.Namespace) -> int:
    on_gpu, ranks = torch.cuda.is_available(), world_from_environment().size
    batch = (f"batch.packs={ranks}", f"batch.lanes={ranks}")
    overrides = [*SHORT, *batch, *(() if on_gpu else NARROW), *arguments.overrides]
    config, stages = read_config(arguments.config, overrides, arguments.stage)
    if arguments.without_deepspeed:
        check_plain(config)
    engines = (True, False) if arguments.without_deepspeed else (True,)
    with process_group(config) as (world, backend):
        kernels = nullcontext() if on_gpu else flash_stand_in(hollow_forward, hollow_backward)
        steps = 2 * (arguments.steps + arguments.warmup)
        with kernels, datasets(config, stages, world, steps, arguments) as prepared:
            if world.is_main:
                print(header(config, world, backend if on_gpu else "hollow", arguments), flush=True)
            for index in stages:
                for deepspeed in engines:
                    result = measure(
                        prepared,
                        index,
                        world,
                        steps=arguments.steps,
                        warmup=arguments.warmup,
                        deepspeed=deepspeed,
                        split=True,
                    )
                    if world.is_main:
                        print(line(result), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return exit_with_message(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
