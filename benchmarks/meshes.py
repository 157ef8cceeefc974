"""The same training step on several meshes: speed, memory, and what every rank sends, measured and planned.

    python benchmarks/meshes.py --ranks 2 --config alpha --meshes dp2 tp2 ep2 --json meshes.json
    python benchmarks/meshes.py --ranks 4 --config tiny
    python benchmarks/meshes.py --ranks 2 --config alpha --meshes dp1 dp2 tp2 --loss-curves 50
    python benchmarks/meshes.py --ranks 4 --config micro --meshes dp4-zero1 dp4-zero2 dp4-zero3

A mesh is named by its sizes: dp2-tp2 are four ranks of which two share tensors; ep2 spreads experts over two
of them; zero2 sets zero.stage; with sp tensor ranks divide the tokens. Without dp it has all of --ranks, with
dp the ranks are dp x tp. By default all meshes of --ranks are measured that the run fits.

Every mesh is launched by itself, one rank a GPU (NCCL), or on CPUs (gloo). It trains a fresh model in one
stage of the run file on random tokens, documents of the model's full length unless --lengths says otherwise,
with the engine and the loaders that training uses. Where a mesh cannot be compiled, runtime.compile is off.

Sent bytes are counted where the process groups are called, in steps of their own: what a rank sends with ring
algorithms, mean of the ranks. They stand beside what `rxt plan` says, which takes every sequence for full.
Memory is the most of any rank that PyTorch had allocated, or on a CPU the resident size; the plan leaves out
workspaces and, on a CPU, Python itself.

With --loss-curves every mesh then trains once more from the same seed, on the same batches of synthetic
stories, and its losses are compared with those of the first mesh. Roundings grow while a model learns, so
the first mesh also trains with smaller micro-batches, which changes nothing but the order of sums: on
average over the steps, other meshes may differ three times as much, else the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# A rank starts this file by its path: make the packages importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

from benchmarks.mesh_names import MeshName, fitting_meshes, parse_mesh
from benchmarks.mesh_tables import ROUNDING, SENT_FOR, Curves, describe, tables
from benchmarks.stepping import COUNTED_STEPS, Result, measure, process_group
from benchmarks.stories import write_stories
from benchmarks.traffic import Traffic
from benchmarks.train_step import setting
from benchmarks.workload import add_arguments, datasets, possible_lengths, read_config
from rxt_dist.arguments import add_overrides
from rxt_dist.config import DataConfig, RunConfig, micro_units
from rxt_dist.config.mesh import step_units
from rxt_dist.errors import FAILED_EXIT_CODE, TrainingError, exit_with_message
from rxt_dist.parallel.bootstrap import World, free_port
from rxt_dist.parallel.groups import open_groups
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.train.plan import plan_run

_SHOWN_CHARACTERS = 3000
_POLL_SECONDS = 0.05


def sent_for(traffic: Traffic, tensor_group: str | None) -> dict[str, float]:
    """Bytes of ``traffic`` by what they are for, with the names of `rxt plan`."""
    found: Counter[str] = Counter(dict.fromkeys(SENT_FOR, 0))
    for (kind, group), size in traffic.sent.items():
        if group == tensor_group:
            found["tensor_parallel"] += size
        elif kind == "all-to-all":
            found["expert_all_to_all"] += size
        elif kind in ("all-gather", "broadcast"):
            found["parameter_all_gather"] += size
        else:
            found["gradient_reduction"] += size
    return dict(found)


def per_step(counts: dict[str, float]) -> dict[str, float]:
    return {name: count / COUNTED_STEPS for name, count in counts.items()}


def by_kind(counts: Counter[tuple[str, str]]) -> dict[str, float]:
    """Sums over the groups."""
    found: Counter[str] = Counter()
    for (kind, _), count in counts.items():
        found[kind] += count
    return dict(found)


def record(result: Result, config: RunConfig, index: int, world: World) -> dict[str, Any]:
    """What all ranks measured, beside the plan, as plain data. Collective."""
    assert result.traffic is not None
    mesh = Mesh(world.size, **config.parallel.model_dump())
    tensor_group = open_groups(mesh, world.rank).tensor.group_name if mesh.tensor_size > 1 else None
    own = {
        "step_seconds": result.step,
        "peak_bytes": result.peak_bytes,
        "sent_bytes": per_step(by_kind(result.traffic.sent)),
        "calls": per_step(by_kind(result.traffic.calls)),
        "sent_bytes_for": per_step(sent_for(result.traffic, tensor_group)),
    }
    ranks: list[dict[str, Any]] = [{} for _ in range(world.size)]
    dist.all_gather_object(ranks, own)
    vocab_size = config.model.vocab_size
    assert isinstance(vocab_size, int)
    planned = plan_run(config, world.size, vocab_size)["stages"][index]
    slowest = max(rank["step_seconds"] for rank in ranks)
    return {
        "ranks": world.size,
        "parallel": config.parallel.model_dump(),
        "zero_stage": config.zero.stage,
        "compiled": config.runtime.compile,
        "micro_batches": planned["micro_batches"],
        "tokens_per_step": result.tokens,
        "step_seconds": slowest,
        "tokens_per_second": result.tokens / slowest,
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "planned_bytes": sum(planned["memory_bytes"].values()) - planned["memory_bytes"]["host_optimizer"],
        "losses": result.losses,
        **{name: _mean([rank[name] for rank in ranks]) for name in ("sent_bytes", "calls", "sent_bytes_for")},
        "planned_bytes_for": {name: planned["communication_bytes"][name] for name in SENT_FOR},
    }


def _mean(counts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for one in counts for name in one})
    return {name: sum(one.get(name, 0.0) for one in counts) / len(counts) for name in names}


def measure_mesh(
    config: RunConfig, index: int, world: World, arguments: argparse.Namespace, stories: Path | None
) -> dict[str, Any]:
    """Measure a stage on the mesh of ``config``, and train on ``stories`` for a loss curve. Collective."""
    steps = arguments.warmup + arguments.steps + COUNTED_STEPS
    with datasets(config, [index], world, steps, arguments) as prepared:
        result = measure(prepared, index, world, steps=arguments.steps, warmup=arguments.warmup, traffic=True)
        found = record(result, prepared, index, world)
    if stories is not None:
        data = DataConfig(text=stories / "text", conversations=stories / "conversations")
        own = config.model_copy(update={"data": data})
        curve = partial(measure, index=index, world=world, steps=arguments.loss_curves, warmup=0)
        found["curve"] = curve(own).losses
        smaller = smaller_micro_batches(own, index, world) if arguments.control else None
        found["control"] = None if smaller is None else curve(smaller).losses
    return found


def smaller_micro_batches(config: RunConfig, index: int, world: World) -> RunConfig | None:
    """``config`` with micro-batches of half the size, or of one pack or lane; None if they have one."""
    stage = config.stages[index]
    micro = micro_units(config, stage, world.dp_size)
    if micro == 1:
        return None
    field = step_units(config, stage).micro_field
    smaller = {field: micro // 2 if micro % 2 == 0 else 1}
    return config.model_copy(update={"batch": config.batch.model_copy(update=smaller)})


def work(arguments: argparse.Namespace) -> None:
    """What each launched rank does."""
    mesh = parse_mesh(arguments.meshes[0], arguments.ranks)
    config, (index,) = read_config(
        arguments.config, [*arguments.overrides, *mesh.overrides()], arguments.stage
    )
    with process_group(config) as (world, backend):
        found = measure_mesh(config, index, world, arguments, arguments.stories)
        found["setting"] = setting(config, world, backend, arguments)
    if world.is_main:
        arguments.result.write_text(json.dumps(found), encoding="utf-8")


def launch(mesh: MeshName, folder: Path, argv: Sequence[str]) -> dict[str, Any]:
    """Run the ranks of ``mesh`` to their end; what they measured.

    Raises:
        TrainingError: a rank failed; the others are ended.
    """
    result, log = folder / f"{mesh.name}.json", folder / f"{mesh.name}.log"
    command = [sys.executable, str(Path(__file__).resolve()), *argv]
    command += ["--meshes", mesh.name, "--result", str(result)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(mesh.ranks)}
    with log.open("wb") as output:
        processes = [
            subprocess.Popen(
                command,
                env={"OMP_NUM_THREADS": "1", **os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for r in range(mesh.ranks)
        ]
        try:
            while (codes := [process.poll() for process in processes]) and None in codes and not any(codes):
                time.sleep(_POLL_SECONDS)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(codes):
        tail = log.read_text(encoding="utf-8", errors="replace")[-_SHOWN_CHARACTERS:]
        raise TrainingError(f"mesh {mesh.name}: a rank ended with code {next(filter(None, codes))}\n{tail}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="run file or name of a packaged one (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of a mesh at most (%(default)s)")
    parser.add_argument("--meshes", nargs="+", metavar="NAME", help="as dp2-tp2 (default: all that fit)")
    parser.add_argument("--stage", type=int, default=0, metavar="INDEX", help="of the run (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (%(default)s)")
    parser.add_argument("--loss-curves", type=int, default=0, metavar="STEPS", help="compare losses of STEPS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    add_overrides(parser, "batch.pack_tokens=8192")
    add_arguments(parser)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stories", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.ranks, arguments.interactions) < 1 or arguments.warmup < 0:
        parser.error("--ranks, --steps and --interactions must be 1 or more, --warmup 0 or more")
    if arguments.loss_curves < 0:
        parser.error("--loss-curves must be 0 or more")
    return arguments


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    config, _ = read_config(arguments.config, arguments.overrides, arguments.stage)
    possible_lengths(arguments, config.model.seq_len)
    if arguments.meshes is None:
        meshes = fitting_meshes(arguments.config, arguments.overrides, arguments.ranks)
    else:
        meshes = [parse_mesh(name, arguments.ranks) for name in arguments.meshes]
        for mesh in meshes:  # a mistake ends the program before anything is launched
            mesh.check(arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        own = [*argv, "--lengths", *(arguments.lengths or [str(config.model.seq_len)] * 2)]
        if arguments.loss_curves:
            assert isinstance(config.model.vocab_size, int)
            write_stories(folder / "stories", config.model.vocab_size)
            own += ["--stories", str(folder / "stories")]
        found, failed = measure_all(meshes, folder, own, arguments.json)
    code = report(found, config, arguments) if found else 0
    return FAILED_EXIT_CODE if failed else code


def measure_all(
    meshes: Sequence[MeshName], folder: Path, argv: Sequence[str], file: Path | None
) -> tuple[dict[str, dict[str, Any]], bool]:
    """What was measured of every mesh, also written to ``file`` after each, and whether one failed."""
    found: dict[str, dict[str, Any]] = {}
    failed = False
    for mesh in meshes:
        start = time.perf_counter()
        try:
            one = found[mesh.name] = launch(mesh, folder, argv if found else [*argv, "--control"])
        except TrainingError as error:
            print(f"{error}\n", file=sys.stderr, flush=True)
            failed = True
            continue
        seconds = time.perf_counter() - start
        print(f"{mesh.name}: {one['tokens_per_second']:,.0f} tokens/s ({seconds:.0f} s)", file=sys.stderr)
        if file is not None:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found, failed


def report(found: dict[str, dict[str, Any]], config: RunConfig, arguments: argparse.Namespace) -> int:
    """Print the tables; the exit code."""
    reference = next(iter(found.values()))
    texts = [describe(reference["setting"], arguments), tables(found)]
    code = 0
    if arguments.loss_curves:
        curves = Curves(found, ROUNDING[config.precision])
        texts.append(curves.text())
        code = 0 if curves.agree() else FAILED_EXIT_CODE
    print("\n\n".join(texts), flush=True)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(given)
    if arguments.result is not None:
        return exit_with_message(lambda: work(arguments))
    return exit_with_message(lambda: run(arguments, given))


if __name__ == "__main__":
    sys.exit(main())
