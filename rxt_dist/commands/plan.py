"""`rxt plan`: what a model or a run needs, before any data, GPU or process group."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rxt_dist.arguments import add_overrides
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from rxt_dist.config import ModelConfig


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser(
        "plan",
        help="parameters of a model, or groups, memory and communication of a run, without data or GPU",
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="NAME|FILE", help="packaged model (as alpha) or model file")
    subject.add_argument("--config", metavar="NAME|FILE", help="packaged run (as tiny) or run file")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the run; needed with --config")
    add_overrides(parser, "parallel.expert_size=2")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens of the vocabulary (default: the model's own, else that of its published card)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        if arguments.world_size is not None or arguments.overrides:
            raise ConfigError("rxt plan: --world-size and --set belong to --config; remove them, or --model")
        _print(_model_counts(arguments.model, arguments.vocab_size), as_json=arguments.json)
        return 0
    if arguments.world_size is None:
        raise ConfigError("rxt plan: --config needs --world-size N, the number of ranks")
    values = _run_plan(arguments.config, arguments.overrides, arguments.world_size, arguments.vocab_size)
    print(json.dumps(values, indent=1) if arguments.json else _plan_text(values))
    return 0


def _run_plan(config_name: str, overrides: list[str], world_size: int, given: int | None) -> dict[str, Any]:
    """See :func:`rxt_dist.train.plan.plan_run`.

    The vocabulary is the given one, the model's own or that of its published card; 0 where none is known.
    """
    from rxt_dist.config import load_config
    from rxt_dist.train.plan import plan_run

    config = load_config(config_name, overrides, require_data=False)
    model = config.model if given is None else _with_vocabulary(config.model, given)
    known = model.card_vocab_size if model.vocab_size == "auto" else model.vocab_size
    return plan_run(config, world_size, known or 0)


def _plan_text(values: dict[str, Any]) -> str:
    """The plan for a reader: bytes with separators, and under the stages how each number is made."""
    lines = []
    for name, value in values["mesh"].items():
        groups = isinstance(value, list)
        text = (
            " ".join("{" + " ".join(map(str, ranks)) + "}" for ranks in value)
            if groups
            else json.dumps(value)
        )
        lines.append(f"{name}: {text}")
    if values["vocab_size"]:
        lines.append(f"vocab_size: {values['vocab_size']}")
    else:
        lines.append("vocab_size: not known, so embedding and heads are left out (give --vocab-size N)")
    for stage in values["stages"]:
        head = f"{stage['tokens_per_rank']:,} tokens a rank and step at most"
        lines += ["", f"stage {stage['name']}: {head}, in {stage['micro_batches']} micro-batches"]
        lines += [f"  memory {name}: {size:,} bytes" for name, size in stage["memory_bytes"].items()]
        lines += [f"  {name}: {size:,} bytes" for name, size in stage["communication_bytes"].items()]
    return "\n".join([*lines, "", *(f"{name}: {text}" for name, text in values["basis"].items())])


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
