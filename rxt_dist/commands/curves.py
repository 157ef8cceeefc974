"""`rxt curves`: draw a run's losses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser("curves", help="draw a run's losses as RUN_DIR/curves.png")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.observe.curves import plot_curves

    print(plot_curves(arguments.run_dir))
    return 0
