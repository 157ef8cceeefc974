"""`rxt eval`: evaluate a run or checkpoint on held-out data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser("eval", help="evaluate a run or checkpoint on held-out data")
    parser.add_argument("path", type=Path, metavar="PATH", help="run folder or checkpoint folder")
    parser.add_argument("--stage", help="stage whose evaluation is made (default: the checkpoint's)")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="default: %(default)s")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value of the run, e.g. --set data.conversations=DIR",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

    record = evaluate_checkpoint(
        arguments.path, arguments.overrides, split=arguments.split, stage_name=arguments.stage
    )
    print(json.dumps(record, indent=1))
    return 0
