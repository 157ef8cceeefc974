"""Speed and memory of optimizer steps, with the engine, the stages and the loaders that training uses.

    python benchmarks/train_step.py --config tiny
    python benchmarks/train_step.py --config alpha --stage 0 --lengths 256 256 --profile --json joint.json
    python benchmarks/train_step.py --config alpha --set runtime.attention_backend=sdpa --set zero.stage=2
    python benchmarks/train_step.py --config micro --without-deepspeed --set batch.packs=64
    deepspeed --num_gpus 2 benchmarks/train_step.py --config alpha --stage 0

Every stage of the run file (or the one that --stage numbers) trains a fresh model on random tokens, which
are written into a temporary folder as real datasets. Everything of a run file can be changed with --set.

Steps are timed without anything that waits for the device, on the GPU's own clock where there is one; the
median is reported, of rank 0. Then more steps follow, in which the host waits after each phase:

    data      waiting for the loader, copying to the device
    forward   losses of all micro-batches
    backward  gradients, and as much of their reduction over the ranks as does not overlap
    update    the rest of the reduction, clipping, AdamW, gathering the weights
    other     carrying the memory of lanes

They add up to more than the step, as nothing overlaps. "wait" is what the timed steps themselves waited for
the loader, "gap" the time of a step in which the GPU does nothing (the step less the kernels of a profile),
"MFU" the operations that a step needs (rxt_dist/stages/flops.py) as a share of the data sheet's rate.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# A launcher starts this file by its path: make the packages importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.devices import device_name, rated
from benchmarks.plain_engine import check_plain
from benchmarks.profiling import TABLE_ROWS, table
from benchmarks.reference_figures import Figure, comparable, comparison
from benchmarks.stepping import MIB, PHASES, Result, measure, process_group
from benchmarks.workload import add_arguments, datasets, possible_lengths, read_config
from rxt_dist.arguments import add_overrides
from rxt_dist.config import RunConfig
from rxt_dist.errors import exit_with_message
from rxt_dist.parallel.bootstrap import World

NAME_WIDTH = 20


def model_flops_utilisation(result: Result, config: RunConfig, world: World) -> float | None:
    """Share of the ranks' rated operations a second that the step needs; None for an unknown device."""
    rates = rated(world.device)
    if rates is None or result.flops_per_token is None:
        return None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return result.flops_per_token * result.tokens_per_second / (rates.matmul[dtype] * world.size)


def header() -> str:
    names = ("step", *PHASES, "wait", "gap", "MFU", "memory")
    units = (*["ms"] * (len(names) - 2), "%", "MiB")
    first = f"{'stage':<{NAME_WIDTH}}{'tokens/step':>12}{'tokens/s':>12}"
    rows = (first, *names), (" " * len(first), *units)
    return "\n".join(head + "".join(f"{cell:>10}" for cell in cells) for head, *cells in rows)


def line(result: Result, utilisation: float | None) -> str:
    """One row of the table."""
    name = result.stage if result.deepspeed else "  without DeepSpeed"
    milliseconds = [result.step, *(result.phases[phase] for phase in PHASES), result.wait, result.gap]
    cells = ["-" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in milliseconds]
    cells.append("-" if utilisation is None else f"{utilisation * 100:.2f}")
    cells.append(f"{result.peak_bytes / MIB:,.0f}")
    return f"{name:<{NAME_WIDTH}}{result.tokens:>12,.0f}{result.tokens_per_second:>12,.0f}" + "".join(
        f"{cell:>10}" for cell in cells
    )


def record(result: Result, utilisation: float | None, figures: Sequence[Figure]) -> dict[str, Any]:
    """A result as plain data; ``reference`` is the best of the ``figures`` that it may be compared with."""
    profile = result.profile
    return {
        "stage": result.stage,
        "engine": "deepspeed" if result.deepspeed else "plain",
        "tokens_per_step": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "step_seconds": result.step,
        "all_step_seconds": result.seconds,
        "phase_seconds": result.phases,
        "start_seconds": result.start,
        "wait_seconds": result.wait,
        "gap_seconds": result.gap,
        "busy_seconds": None if profile is None else profile.busy,
        "message_seconds": None if profile is None else profile.messages,
        "exposed_message_seconds": None if profile is None else profile.exposed,
        "flops_per_token": result.flops_per_token,
        "mfu": utilisation,
        "reference": figures[-1].tokens_per_second if figures else None,
        "peak_bytes": result.peak_bytes,
        "losses": result.losses,
        "kernels": [] if profile is None else [asdict(kernel) for kernel in profile.kernels],
    }


def setting(config: RunConfig, world: World, backend: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, model and batch: what a number is worth nothing without."""
    from deepspeed import __version__ as deepspeed_version

    return {
        "device": device_name(world.device),
        "ranks": world.size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed_version,
        "config": arguments.config,
        "overrides": arguments.overrides,
        "lengths": arguments.lengths,
        "model": config.model.name,
        "vocab_size": config.model.vocab_size,
        "precision": config.precision,
        "attention_backend": backend,
        "zero": config.zero.model_dump(),
        "runtime": config.runtime.model_dump(mode="json"),
        "parallel": config.parallel.model_dump(),
        "batch": config.batch.model_dump(),
        "steps": arguments.steps,
        "warmup": arguments.warmup,
    }


def describe(found: dict[str, Any]) -> str:
    """The setting in words."""
    batch = found["batch"]
    lanes = f", {batch['lanes']} lanes, window {batch['window']}" if batch["lanes"] else ""
    changed = f"\nset: {', '.join(found['overrides'])}" if found["overrides"] else ""
    lengths = f"\nlengths: {' '.join(found['lengths'])}" if found["lengths"] else ""
    return (
        f"{found['device']}; ranks: {found['ranks']}; python {found['python']}, torch {found['torch']}, "
        f"deepspeed {found['deepspeed']}\n"
        f"{found['model']}: vocabulary {found['vocab_size']}, {found['precision']}, attention "
        f"{found['attention_backend']}, ZeRO {found['zero']['stage']}; {batch['packs']} packs of "
        f"{batch['pack_tokens']} tokens{lanes}{changed}{lengths}\n"
        f"median of {found['steps']} steps after {found['warmup']} of warm-up; memory is the peak of rank 0"
        + (" since it started" if found["device"].startswith("CPU") else "")
    )


def trace_file(given: Path | None, world: World) -> Path | None:
    """Where a rank writes what it ran: ``given``, or beside it."""
    return given if given is None or world.is_main else given.with_stem(f"{given.stem}.rank{world.rank}")


def measure_stage(
    config: RunConfig, index: int, world: World, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure a stage with DeepSpeed and, if asked for, without; rank 0 prints. Collective."""
    records, deepspeed_step = [], 0.0
    lengths = possible_lengths(arguments, config.model.seq_len).tolist()
    figures = comparable(config, config.stages[index], lengths, device_name(world.device), world.size)
    for deepspeed in (True, False) if arguments.without_deepspeed else (True,):
        result = measure(
            config,
            index,
            world,
            steps=arguments.steps,
            warmup=arguments.warmup,
            deepspeed=deepspeed,
            split=True,
            profile=arguments.profile,
            trace=trace_file(arguments.trace, world) if deepspeed else None,
        )
        utilisation = model_flops_utilisation(result, config, world)
        records.append(record(result, utilisation, figures))
        notes = comparison(figures, result.tokens, result.tokens_per_second)
        if deepspeed:
            deepspeed_step = result.step
        else:
            notes.append(f"DeepSpeed adds {deepspeed_step / result.step - 1:.1%} to the step")
        if world.is_main:
            print("\n".join((line(result, utilisation), *(f"  {note}" for note in notes))), flush=True)
            if arguments.profile and result.profile is not None:
                print(f"{table(result.profile, result.step)}\n", flush=True)
    return records


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="run file or name of a packaged one (%(default)s)")
    parser.add_argument("--stage", type=int, metavar="INDEX", help="number of one stage (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (%(default)s)")
    parser.add_argument(
        "--without-deepspeed", action="store_true", help="measure the same step with PyTorch alone too"
    )
    parser.add_argument(
        "--profile", action="store_true", help=f"print the {TABLE_ROWS} kernels that take longest"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="with --profile and one stage: write what rank 0 ran, by time; rank N writes STEM.rankN.SUFFIX",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    add_overrides(parser, "batch.pack_tokens=8192")
    add_arguments(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.warmup < 0 or arguments.interactions < 1:
        parser.error("--steps and --interactions must be 1 or more, --warmup 0 or more")
    if arguments.trace is not None and (arguments.stage is None or not arguments.profile):
        parser.error("--trace needs --profile and --stage")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    config, stages = read_config(arguments.config, arguments.overrides, arguments.stage)
    # A mistake ends all ranks here, before one waits for the others.
    possible_lengths(arguments, config.model.seq_len)
    if arguments.without_deepspeed:
        check_plain(config)
    steps = arguments.steps + arguments.warmup
    with (
        process_group(config) as (world, backend),
        datasets(config, stages, world, steps, arguments) as prepared,
    ):
        found = setting(prepared, world, backend, arguments)
        if world.is_main:
            print(f"{describe(found)}\n\n{header()}", flush=True)
        found["results"] = []
        for index in stages:
            found["results"] += measure_stage(prepared, index, world, arguments)
        if world.is_main and arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return exit_with_message(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
