"""`rxt import`: make a native model folder of published ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser("import", help="make a native model folder of published ones")
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="published folder: a full model or a component; several are joined into one model",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--rope-layout",
        choices=("interleaved", "halves"),
        help="how rotated pairs lie in the stored weights (default: as the configuration says, else "
        "interleaved); halves are converted",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE|DIR",
        help="tokenizer of the model (default: the tokenizer.json in DIR)",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        default=[],
        metavar="NAME=ID",
        help="ids of special tokens, e.g. query=5 answer=6",
    )
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="CLASS",
        help="published class of the component of its kind, where the tensors do not tell (may be repeated)",
    )
    parser.add_argument(
        "--embedding",
        choices=("decoder", "encoder"),
        help="whose embedding is kept where encoder and decoder have different ones (default: refused)",
    )
    parser.add_argument("--drop-stm", action="store_true", help="leave a stored memory behind")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.interchange.import_folders import ImportOptions, import_published
    from rxt_dist.interchange.tokenizer import parse_tokens

    options = ImportOptions(
        rope_layout=arguments.rope_layout,
        tokenizer=arguments.tokenizer,
        tokens=parse_tokens(arguments.tokens),
        classes=arguments.classes,
        embedding=arguments.embedding,
        drop_stm=arguments.drop_stm,
    )
    print("\n".join(import_published(arguments.folders, arguments.output, options)))
    return 0
