"""`rxt eval`: evaluate a run or checkpoint on held-out data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rxt_dist.arguments import add_overrides

EVALUATION_FILE = "evaluation.json"


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser("eval", help="evaluate a run or checkpoint on held-out data")
    parser.add_argument("path", type=Path, metavar="PATH", help="run folder or checkpoint folder")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--stage", help="stage whose evaluation is made (default: the checkpoint's)")
    chosen.add_argument(
        "--memory", action="store_true", help="answers with the true, a fresh and a foreign memory"
    )
    parser.add_argument("--split", choices=("val", "train"), default="val", help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for {EVALUATION_FILE}, and memory.png with --memory (default: only print)",
    )
    add_overrides(parser, "data.conversations=DIR")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.errors import ConfigError
    from rxt_dist.observe.memory_plot import plot_memory
    from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

    folder: Path | None = arguments.output
    if folder is not None:  # made first: an evaluation can take long
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output: folder {folder} cannot be made: {error.strerror}") from error
    record = evaluate_checkpoint(
        arguments.path,
        arguments.overrides,
        split=arguments.split,
        stage_name=arguments.stage,
        memory=arguments.memory,
    )
    text = json.dumps(record, indent=1)
    print(text)
    if folder is not None:
        (folder / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")
        if arguments.memory:
            plot_memory(folder, record)
    return 0
