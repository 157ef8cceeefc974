"""What the datasets decide: whether each stage has one, the vocabulary and the special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from rxt_dist.config.base import Problem
from rxt_dist.config.model import SpecialTokens
from rxt_dist.config.problems import explain
from rxt_dist.config.run import RunConfig
from rxt_dist.config.stage import DATA_KINDS, STAGE_DATA, DataKind
from rxt_dist.errors import ConfigError

TOKEN_NAMES = {
    "pad": "[PAD]",
    "unk": "[UNK]",
    "bos": "[BOS]",
    "eos": "[EOS]",
    "mask": "[MASK]",
    "query": "[Q]",
    "answer": "[A]",
}
"""Name in a dataset's tokenizer of every field of :class:`SpecialTokens`."""


def data_problems(config: RunConfig) -> list[Problem]:
    """Stages whose dataset is not set, by field of ``data``."""
    problems = []
    for kind in DATA_KINDS:
        users = [f"{i} ({s.name})" for i, s in enumerate(config.stages) if STAGE_DATA[s.name] == kind]
        if users and getattr(config.data, kind) is None:
            stages = f"stage {users[0]} needs" if len(users) == 1 else f"stages {', '.join(users)} need"
            hint = f"set it to a dataset folder, for example --set data.{kind}=FOLDER"
            problems.append(Problem(f"data.{kind}", f"not set, but {stages} it; {hint}"))
    return problems


def resolve_dataset(
    config: RunConfig,
    *,
    vocab_size: int,
    special_ids: Mapping[str, int],
    tokenizer_sha256: Mapping[str, str],
) -> RunConfig:
    """Fill in the ``auto`` values of the model from the datasets.

    Args:
        config: the run.
        vocab_size: vocabulary of the datasets' tokenizer.
        special_ids: its special tokens, by their name in the tokenizer (``[BOS]``); others are ignored.
        tokenizer_sha256: hash of each dataset's tokenizer, by field of ``data`` (``text``), or field and
            number in its list (``text.1``).

    Raises:
        ConfigError: the datasets do not share one tokenizer, it lacks a special token, or an explicit
            value of the configuration differs.
    """
    if len(set(tokenizer_sha256.values())) > 1:
        hashes = tokenizer_sha256.items()
        found = ", ".join(f"data.{name} ({_location(config, name)}) has {sha[:12]}" for name, sha in hashes)
        raise ConfigError(f"datasets: {found}; all datasets of a run must be made with the same tokenizer")
    missing = [name for name in TOKEN_NAMES.values() if name not in special_ids]
    if missing:
        raise ConfigError(f"datasets: the tokenizer lacks {', '.join(missing)}")
    tokens = {field: special_ids[name] for field, name in TOKEN_NAMES.items()}
    _refuse_difference("model.vocab_size", config.model.vocab_size, vocab_size)
    if isinstance(config.model.special_tokens, SpecialTokens):
        for field, token in tokens.items():
            own: int = getattr(config.model.special_tokens, field)
            _refuse_difference(f"model.special_tokens.{field}", own, token)
    data: dict[str, Any] = config.model_dump()
    data["model"] |= {"vocab_size": vocab_size, "special_tokens": tokens}
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        lines = "; ".join(str(problem) for problem in explain(error, RunConfig))
        raise ConfigError(f"datasets: {lines}") from error


def _location(config: RunConfig, name: str) -> Path | str:
    kind, _, number = name.partition(".")
    return config.data.datasets(cast(DataKind, kind))[int(number or 0)].path


def _refuse_difference(field: str, own: int | str, dataset: int) -> None:
    if own not in ("auto", dataset):
        raise ConfigError(f"{field}: found {own}, but the dataset has {dataset}; valid: auto, {dataset}")
