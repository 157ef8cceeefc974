"""The demonstration: data, tokenizer, shards, four training stages, and a check that the memory works."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxt_dist.config import load_config
from rxt_dist.errors import RxtError, TrainingError
from rxt_dist.observe.curves import plot_curves
from rxt_dist.observe.metrics_file import EVALUATION_FILE, read_metrics
from rxt_dist.parallel.bootstrap import free_port

logger = logging.getLogger(__name__)

RUN_FILE = "demo"
HELD_OUT_FILE = "held_out.json"
# Other seeds than the training data's: new bindings of names, things and values.
_TRAIN_SEED, _HELD_OUT_SEED = 1, 2
_CONVERSATIONS, _STORIES, _HELD_OUT = 12_000, 2_000, 400
_VOCABULARY = 512
_RANKS = 2


@dataclass(frozen=True)
class Bounds:
    """What the demonstration must show, over marked tokens at distances 1 to ``distances``."""

    distances: int = 3
    marked: int = 300
    least_true: float = 0.80
    most_other: float = 0.20


def run_demo(folder: Path, bounds: Bounds | None = None) -> str:
    """Run or continue the demonstration in ``folder`` and return the report.

    Every step that is finished already is skipped, training continues from its last checkpoint, so an
    interrupted demonstration can simply be started again. Raises :class:`TrainingError` when a program
    fails or the memory does not do what ``bounds`` asks.
    """
    bounds = bounds or Bounds()
    data = folder / "data"
    run_dir = folder / "run"
    _prepare_data(data)
    _train(data, run_dir)
    record = _evaluate_held_out(data, run_dir)
    picture = plot_curves(run_dir, record["memory"])
    exporter = load_config(RUN_FILE, require_data=False).metrics.prometheus
    lines = [
        *_stage_table(read_metrics(run_dir / EVALUATION_FILE)),
        "",
        *_memory_table(record),
        "",
        f"curves and recall: {picture}",
        f"metrics while training: http://{exporter.host}:{exporter.base_port}/metrics (see monitoring/)",
    ]
    report = "\n".join(lines)
    problems = check(record, bounds)
    if problems:
        raise TrainingError("\n".join([report, "", *problems]))
    return report


def check(record: dict[str, Any], bounds: Bounds) -> list[str]:
    """What the evaluation ``record`` lacks to show that the memory works; empty when it does."""
    problems = []
    for name, memory in record["memory"].items():
        correct, count = _pooled(memory, range(1, bounds.distances + 1))
        recall = correct / max(1.0, count)
        if count < bounds.marked:
            problems.append(f"only {count:.0f} marked tokens were asked for; {bounds.marked} are needed")
        elif name == "true" and recall < bounds.least_true:
            problems.append(
                f"recall with the true memory is {recall:.1%}; at least {bounds.least_true:.0%} expected"
            )
        elif name != "true" and recall > bounds.most_other:
            problems.append(
                f"recall with a {name} memory is {recall:.1%}; at most {bounds.most_other:.0%} expected"
            )
    return list(dict.fromkeys(problems))  # the count is the same for every memory


def _prepare_data(data: Path) -> None:
    raw, unseen = data / "raw", data / "raw_held_out"
    for output, seed, conversations, stories in (
        (raw, _TRAIN_SEED, _CONVERSATIONS, _STORIES),
        (unseen, _HELD_OUT_SEED, _HELD_OUT, 1),
    ):
        numbers = ["--seed", seed, "--conversations", conversations, "--stories", stories]
        shape = ["--profile", "recall", "--distance-weights", "linear"]
        prepare(output / "conversations.jsonl", "synth", "--output", output, *shape, *numbers)
    tokenizer = data / "tokenizer"
    inputs: list[object] = ["--input", raw / "stories.jsonl", "--input", raw / "conversations.jsonl"]
    size = ["--vocab-size", _VOCABULARY]
    prepare(tokenizer / "tokenizer.json", "tokenizer", *inputs, *size, "--output", tokenizer)
    for name, kind, source in (
        ("text", "text", raw / "stories.jsonl"),
        ("conversations", "conversations", raw / "conversations.jsonl"),
        ("held_out", "conversations", unseen / "conversations.jsonl"),
    ):
        target = data / name
        arguments = [kind, "--input", source, "--tokenizer", tokenizer, "--output", target]
        prepare(target / "manifest.json", "shard", *arguments)


def prepare(result: Path, *arguments: object) -> None:
    """Run one rxt-data command unless its result is there; TrainingError or RxtError when it fails."""
    if result.exists():
        return
    _run([sys.executable, "-m", "data_prep", *(str(argument) for argument in arguments)], os.environ)


def _train(data: Path, run_dir: Path) -> None:
    import torch

    devices = torch.cuda.device_count()
    ranks = min(_RANKS, devices) if devices else _RANKS
    environment = dict(os.environ)
    if not devices:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    settings = [f"data.text={data / 'text'}", f"data.conversations={data / 'conversations'}"]
    _run(training_command(["--num_gpus", str(ranks)], RUN_FILE, run_dir, settings), environment)


def training_command(place: Sequence[str], config: str, run_dir: Path, settings: Sequence[str]) -> list[str]:
    """The DeepSpeed launcher's command that starts a run, or goes on with it where ``run_dir`` exists.

    ``place`` are the launcher's options that say on which devices, ``settings`` go to ``--set``.
    """
    from rxt_dist import __file__ as package

    script = Path(package).resolve().parent.parent / "launch" / "train.py"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *place]
    command += ["--master_port", str(free_port()), str(script), "--config", config]
    for setting in (*settings, f"runtime.run_dir={run_dir}"):
        command += ["--set", setting]
    return [*command, "--resume"] if run_dir.exists() else command


def _evaluate_held_out(data: Path, run_dir: Path) -> dict[str, Any]:
    from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

    # All conversations of that dataset are held out, so its larger split serves.
    overrides = [f"data.conversations={data / 'held_out'}"]
    record = evaluate_checkpoint(run_dir, overrides, split="train")
    (run_dir / HELD_OUT_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def _run(command: Sequence[str], environment: Any) -> None:
    code = subprocess.run(command, env=environment, check=False).returncode
    if code == 2:
        raise RxtError(f"`{' '.join(command[1:5])} ...` refused its input, see above")
    if code != 0:
        raise TrainingError(f"`{' '.join(command[1:5])} ...` ended with exit code {code}, see above")


def _stage_table(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = [f"{'stage':<18}{'steps':>6}  held-out losses and accuracies"]
    for record in records:
        values = [
            f"{name} {value:.3f}"
            for name, value in record.items()
            if isinstance(value, float) and (name.endswith(("_loss", "_accuracy", "_gain")))
        ]
        lines.append(f"{record['stage']:<18}{record['step']:>6}  {'  '.join(values)}")
    return lines


def _memory_table(record: dict[str, Any]) -> list[str]:
    distances = sorted({int(d) for memory in record["memory"].values() for d in memory["recall_by_distance"]})
    header = "".join(f"{f'd={d}':>8}" for d in distances)
    lines = [
        "answers to held-out conversations, by the memory the decoder reads",
        f"{'memory':<10}{'loss':>8}{'accuracy':>10}{'recall':>8}{header}",
    ]
    for name, memory in record["memory"].items():
        cells = [_share(*_pooled(memory, [d])) for d in distances]
        recall = _share(*_pooled(memory, distances))
        lines.append(
            f"{name:<10}{memory['answer_loss']:>8.3f}{memory['answer_accuracy']:>10.1%}{recall:>8}"
            + "".join(f"{cell:>8}" for cell in cells)
        )
    counts = [f"{_pooled(record['memory']['true'], [d])[1]:.0f}" for d in distances]
    lines.append(f"{'marked':<36}" + "".join(f"{count:>8}" for count in counts))
    return lines


def _pooled(memory: dict[str, Any], distances: Iterable[int]) -> tuple[float, float]:
    """(correct, count) of marked tokens at the given distances."""
    pairs = [memory["recall_by_distance"].get(str(d), (0.0, 0.0)) for d in distances]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _share(correct: float, count: float) -> str:
    return f"{correct / count:.1%}" if count else "-"
