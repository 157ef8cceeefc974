"""`rxt plan`: what a model needs, before any data, GPU or process group."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from rxt_dist.config import ModelConfig


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser("plan", help="count a model's parameters, without data or GPU")
    parser.add_argument(
        "--model", required=True, metavar="NAME|FILE", help="packaged model (as alpha) or model file"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens of the vocabulary (default: the model's own, else that of its published card)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    _print(_model_counts(arguments.model, arguments.vocab_size), as_json=arguments.json)
    return 0


def _model_counts(model: str, vocab_size: int | None) -> dict[str, int]:
    """The vocabulary that is counted with, and all parameter counts by name.

    Raises:
        ConfigError: no such model, its file is wrong, or the vocabulary is unknown or does not fit it.
    """
    from rxt_dist.config import load_model_config
    from rxt_dist.model import count_parameters

    config = load_model_config(model)
    if vocab_size is not None:
        config = _with_vocabulary(config, vocab_size)
    vocabulary = config.card_vocab_size if config.vocab_size == "auto" else config.vocab_size
    if vocabulary is None:
        raise ConfigError(
            f"model {model}: vocab_size is auto and card_vocab_size is not set; give it with --vocab-size N"
        )
    return {"vocab_size": vocabulary, **count_parameters(config, vocabulary)}


def _with_vocabulary(config: ModelConfig, vocab_size: int) -> ModelConfig:
    from pydantic import ValidationError

    from rxt_dist.config import ModelConfig
    from rxt_dist.config.problems import explain

    try:
        return ModelConfig.model_validate({**config.model_dump(), "vocab_size": vocab_size})
    except ValidationError as error:
        problems = "; ".join(str(problem) for problem in explain(error, ModelConfig))
        raise ConfigError(f"model {config.name} with --vocab-size {vocab_size}: {problems}") from error


def _print(values: dict[str, int], *, as_json: bool) -> None:
    """One ``name: N`` a line, or one JSON object."""
    if as_json:
        print(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        print(f"{name}: {value}")
