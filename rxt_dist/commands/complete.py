"""`rxt complete`: continue a text."""

from __future__ import annotations

import argparse
from typing import Any

from rxt_dist.commands.generation import add_model_arguments, add_sampling_arguments, sampling_of


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser("complete", help="continue a text with a decoder")
    parser.add_argument("text", metavar="TEXT", help="how the text begins")
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="most tokens to add (default: up to the model's seq_len)"
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="skip the memory cross-attention instead of reading the initial memory",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.inference import complete
    from rxt_dist.inference.completion import COMPONENTS
    from rxt_dist.inference.models import open_model

    sampling = sampling_of(arguments)
    pretrained = open_model(
        arguments.model, COMPONENTS, device=arguments.device, precision=arguments.precision
    )
    pieces = complete(
        pretrained,
        arguments.text,
        sampling=sampling,
        max_tokens=arguments.tokens,
        seed=arguments.seed,
        memory=not arguments.no_memory,
    )
    print(arguments.text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
