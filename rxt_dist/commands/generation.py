"""What the commands that run a model have in common: which model, where, and how tokens are drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rxt_dist.inference import Sampling


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--device`` and ``--precision``."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="PATH",
        help="native model folder, run folder or checkpoint folder",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, ... (default: auto)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """``--temperature``, ``--top-k``, ``--top-p`` and ``--seed``."""
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most probable token (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens whose sum first exceeds P (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """What the sampling arguments say; ConfigError when one is out of range."""
    from rxt_dist.inference import Sampling

    return Sampling(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)
