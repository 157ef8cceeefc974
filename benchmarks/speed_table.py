"""Speed of the models and stages in one table: many calls of benchmarks/train_step.py, one JSON file.

    python benchmarks/speed_table.py --json speed.json
    python benchmarks/speed_table.py --minutes 4 --only "alpha joint" "alpha smat W=1" --json speed.json
    python benchmarks/speed_table.py --eager --set zero.stage=2 --json eager.json

Each GPU that is visible takes the next call when it has finished one, so that calls never share a GPU. The
most important come first (benchmarks/speed_runs.py); what does not fit into --minutes is left out, and the
table says so. Steps are compiled unless --eager is given.

    ratio     to the best batch of rxlm 0.3.92 (docs/performance-log.md), where device and sizes are its
    busy      share of the step in which the GPU works
    tax       what DeepSpeed adds to the step
    wait      for the loader
    start     seconds until the first measured step: building, and compiling
    took      seconds of the whole call
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As benchmarks/train_step.py: the packages are importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.speed_runs import CALLS, Call, story_lengths

PROGRAM = Path(__file__).resolve().with_name("train_step.py")
LEAST_SECONDS = 25.0
"""A call is not started with less time left."""
STORY_LENGTH = 256
GIB = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a call: what train_step.py wrote, or why it wrote nothing."""

    call: Call
    seconds: float
    found: dict[str, Any] | None
    failure: str = ""


def visible_gpus() -> list[str]:
    """Values for CUDA_VISIBLE_DEVICES, one a GPU; an empty one where there is none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    return names or [""]


def run_call(
    call: Call, options: Sequence[str], gpu: str, folder: Path, threads: int, limit: float
) -> Outcome:
    """Run one call on ``gpu`` for at most ``limit`` seconds."""
    stem = folder / call.name.replace(" ", "-").replace("=", "")
    file, log = stem.with_suffix(".json"), stem.with_suffix(".log")
    arguments = [*call.arguments(folder / "lengths.txt"), *options, "--json", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                [sys.executable, str(PROGRAM), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=limit,
                check=False,
            ).returncode
            failure = f"exit code {code}: {_last_line(log)}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit:.0f} s: no time"
    found = None if failure else json.loads(file.read_text(encoding="utf-8"))
    return Outcome(call, time.monotonic() - started, found, failure)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def run_calls(
    calls: Sequence[Call],
    options: Sequence[str],
    gpus: Sequence[str],
    folder: Path,
    *,
    seconds: float,
    most: float,
    report: Callable[[Outcome], None],
) -> list[Outcome]:
    """All calls in their order, each GPU one at a time, within ``seconds``; a call takes at most ``most``."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / "lengths.txt", story_lengths(STORY_LENGTH), fmt="%d")
    waiting: queue.SimpleQueue[Call] = queue.SimpleQueue()
    for call in calls:
        waiting.put(call)
    threads = max(1, (os.cpu_count() or 1) // len(gpus))
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []

    def work(gpu: str) -> None:
        while True:
            try:
                call = waiting.get_nowait()
            except queue.Empty:
                return
            left = end - time.monotonic()
            if left < min(LEAST_SECONDS, most):
                outcome = Outcome(call, 0.0, None, "left out: no time")
            else:
                outcome = run_call(call, options, gpu, folder, threads, min(left, most))
            outcomes.append(outcome)
            report(outcome)

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sorted(outcomes, key=lambda outcome: calls.index(outcome.call))


def header() -> str:
    names = (
        "tok/step",
        "tok/s",
        "ratio",
        "step ms",
        "busy",
        "tax",
        "MFU",
        "wait ms",
        "GiB",
        "start s",
        "took s",
    )
    return f"{'':<22}" + "".join(f"{name:>10}" for name in names)


def row(outcome: Outcome) -> str:
    """One row of the table."""
    name = f"{outcome.call.name:<22}"
    if outcome.found is None:
        return f"{name}  {outcome.failure}"
    by_engine = {result["engine"]: result for result in outcome.found["results"]}
    result, plain = by_engine["deepspeed"], by_engine.get("plain")
    step, busy, reference = result["step_seconds"], result["busy_seconds"], result["reference"]
    cells = [
        f"{result['tokens_per_step']:,.0f}",
        f"{result['tokens_per_second']:,.0f}",
        "-" if reference is None else f"{result['tokens_per_second'] / reference:.2f}",
        f"{step * 1e3:.1f}",
        "-" if busy is None else f"{busy / step:.0%}",
        "-" if plain is None else f"{step / plain['step_seconds'] - 1:.1%}",
        "-" if result["mfu"] is None else f"{result['mfu']:.1%}",
        f"{result['wait_seconds'] * 1e3:.2f}",
        f"{result['peak_bytes'] / GIB:.1f}",
        f"{result['start_seconds']:.0f}",
        f"{outcome.seconds:.0f}",
    ]
    return name + "".join(f"{cell:>10}" for cell in cells)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [call.name for call in CALLS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help=f"of: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (%(default)s)")
    parser.add_argument("--most", type=float, default=150.0, help="seconds for one call (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all calls")
    parser.add_argument(
        "--folder", type=Path, help="for the logs and results of the calls (default: temporary)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    calls = [call for call in CALLS if arguments.only is None or call.name in arguments.only]
    settings = [*arguments.set, f"runtime.compile={'false' if arguments.eager else 'true'}"]
    options = ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    options += [part for value in settings for part in ("--set", value)]
    gpus = visible_gpus()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}, {arguments.steps} steps\n{header()}", flush=True)
        outcomes = run_calls(
            calls,
            options,
            gpus,
            folder,
            seconds=arguments.minutes * 60,
            most=arguments.most,
            report=lambda outcome: print(row(outcome), flush=True),
        )
    if arguments.json is not None:
        rows = {
            outcome.call.name: {
                "seconds": outcome.seconds,
                "failure": outcome.failure,
                "found": outcome.found,
            }
            for outcome in outcomes
        }
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.found is None for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
