"""The command line of `rxt`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rxt_dist.commands import (
    chat,
    complete,
    curves,
    demo,
    evaluate,
    export_model,
    fill_mask,
    import_model,
    plan,
)
from rxt_dist.errors import FAILED_EXIT_CODE, TrainingError, exit_with_message

COMMANDS = (demo, evaluate, curves, chat, complete, fill_mask, plan, import_model, export_model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rxt`; returns 0, 1 (a run failed or did not show what it must) or 2 (a user error)."""
    arguments = _parser().parse_args(argv)
    return exit_with_message(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except TrainingError as error:
        print(error, file=sys.stderr)
        return FAILED_EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rxt", description="Train and examine Reactive Transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
