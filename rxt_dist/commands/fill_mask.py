"""`rxt fill-mask`: what an encoder reads in the place of masked tokens."""

from __future__ import annotations

import argparse
from typing import Any

from rxt_dist.commands.generation import add_model_arguments


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser(
        "fill-mask", help="the most probable tokens for each [MASK] of a text, by the encoder's MLM head"
    )
    parser.add_argument("text", metavar="TEXT", help="with [MASK] in the place of tokens")
    add_model_arguments(parser)
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="tokens shown of each [MASK] (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.inference import fill_mask
    from rxt_dist.inference.fill_mask import COMPONENTS
    from rxt_dist.inference.models import open_model

    pretrained = open_model(
        arguments.model, COMPONENTS, device=arguments.device, precision=arguments.precision
    )
    for number, candidates in enumerate(fill_mask(pretrained, arguments.text, arguments.top), start=1):
        print(f"[MASK] {number}")
        for candidate in candidates:
            print(f"  {candidate.probability:6.1%}  {candidate.text!r}")
    return 0
