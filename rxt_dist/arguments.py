"""Options that several command lines share."""

from __future__ import annotations

import argparse


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Add ``--set KEY=VALUE``, collected as ``overrides``; ``example`` is one such pair for the help text."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override one value of the run, e.g. --set {example} (may be repeated)",
    )
