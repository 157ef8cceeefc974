"""The command line of `rxt`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rxt_dist.errors import FAILED_EXIT_CODE, TrainingError, exit_with_message


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
    demo = commands.add_parser(
        "demo", help="train a small model in four stages and show that its memory works"
    )
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    demo.set_defaults(run=_demo)
    evaluate = commands.add_parser("eval", help="evaluate a run or checkpoint on held-out data")
    evaluate.add_argument("path", type=Path, metavar="PATH", help="run folder or checkpoint folder")
    evaluate.add_argument("--stage", help="stage whose evaluation is made (default: the checkpoint's)")
    evaluate.add_argument("--split", choices=("val", "train"), default="val", help="default: %(default)s")
    evaluate.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value of the run, e.g. --set data.conversations=DIR",
    )
    evaluate.set_defaults(run=_evaluate)
    curves = commands.add_parser("curves", help="draw a run's losses as RUN_DIR/curves.png")
    curves.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    curves.set_defaults(run=_curves)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from rxt_dist.demo import run_demo

    print(run_demo(arguments.output))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

    record = evaluate_checkpoint(
        arguments.path, arguments.overrides, split=arguments.split, stage_name=arguments.stage
    )
    print(json.dumps(record, indent=1))
    return 0


def _curves(arguments: argparse.Namespace) -> int:
    from rxt_dist.observe.curves import plot_curves

    print(plot_curves(arguments.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
