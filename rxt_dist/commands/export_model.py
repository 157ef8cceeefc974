"""`rxt export`: write a model in the published format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser("export", help="write a model in the published format")
    parser.add_argument("path", type=Path, metavar="PATH", help="native model folder, run or checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--components",
        default="all",
        metavar="NAMES",
        help="all, full (the full model, in OUT itself), or component names with commas between them "
        "(encoder,decoder,memory_attention,mlm_head; each in a subfolder); default: %(default)s",
    )
    parser.add_argument(
        "--rope-layout",
        choices=("interleaved", "halves"),
        default="interleaved",
        help="how rotated pairs lie in the written weights; releases before December 2025 read halves "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.interchange.export_folders import export_model

    names = [name.strip() for name in arguments.components.split(",")]
    print("\n".join(export_model(arguments.path, arguments.output, names, arguments.rope_layout)))
    return 0
