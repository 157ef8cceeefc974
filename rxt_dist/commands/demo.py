"""`rxt demo`: train a small model in four stages and show that its memory works."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser(
        "demo", help="train a small model in four stages and show that its memory works"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.demo import run_demo

    print(run_demo(arguments.output))
    return 0
