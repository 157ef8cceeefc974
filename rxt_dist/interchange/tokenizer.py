"""Tokenizers of published models, made to serve here: complete ids, and a decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tokenizers import Tokenizer, decoders

from rxt_dist.config.dataset import TOKEN_NAMES
from rxt_dist.config.model import SpecialTokens
from rxt_dist.data.tokens import TOKENIZER_FILE
from rxt_dist.errors import CheckpointError, ConfigError

# The numbers of those that come first in every published tokenizer.
_USUAL = {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}


def import_tokenizer(path: Path, vocab_size: int | None) -> tuple[Tokenizer, list[str]]:
    """(tokenizer, what was changed) of a published tokenizer.

    A byte-level tokenizer without a decoder gets one, so that decoding gives the text back. Tokens that were
    added behind the vocabulary of the model, which has no row for them, are taken away.

    Args:
        path: tokenizer file, or a folder with a ``tokenizer.json``.
        vocab_size: of the model, None if it is not known.

    Raises:
        CheckpointError: the file is missing or is no tokenizer, or its vocabulary is not the model's.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected a tokenizer")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        done = _drop_added(content, vocab_size)
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the tokenizers library raises plain Exception for a bad file
        raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
    size = tokenizer.get_vocab_size()
    if vocab_size is not None and size != vocab_size:
        raise CheckpointError(
            f"{file}: the tokenizer has {size} tokens, the model a vocabulary of {vocab_size}; give the "
            "tokenizer that the model was trained with"
        )
    if tokenizer.decoder is None and "ByteLevel" in json.dumps(content.get("pre_tokenizer")):
        tokenizer.decoder = decoders.ByteLevel()
        done.append("byte-level decoder added")
    tokenizer.encode_special_tokens = True
    return tokenizer, done


def _drop_added(content: Any, vocab_size: int | None) -> list[str]:
    """Remove the tokens at the end of ``content``, a tokenizer's JSON, that the model has no row for."""
    added = content.get("added_tokens") or []
    beyond = [token for token in added if vocab_size is not None and token["id"] >= vocab_size]
    if not beyond:
        return []
    content["added_tokens"] = [token for token in added if token not in beyond]
    names = ", ".join(token["content"] for token in beyond)
    return [f"tokens without a row in the embedding left out: {names}"]


def parse_tokens(pairs: list[str]) -> dict[str, int]:
    """``NAME=ID`` arguments as ids by the fields of SpecialTokens; ConfigError when one is not valid."""
    found: dict[str, int] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in TOKEN_NAMES or not value.isascii() or not value.isdigit():
            valid = ", ".join(TOKEN_NAMES)
            raise ConfigError(f"--tokens {pair}: must be NAME=ID with a number; valid names: {valid}")
        if found.get(name, int(value)) != int(value):
            raise ConfigError(f"--tokens {pair}: {name} was given as {found[name]} already")
        found[name] = int(value)
    return found


def special_tokens(
    given: Mapping[str, int], tokenizer: Tokenizer | None, configured: Mapping[str, int], source: str
) -> SpecialTokens | None:
    """The special tokens of a published model.

    Args:
        given: ids that the user gave, which decide.
        tokenizer: of the model; configured: ids that its configuration names, which must agree.
        source: how messages call the model.

    Returns:
        None where they are not known: there is no tokenizer, and not all were given or configured.

    Raises:
        CheckpointError: the tokenizer lacks one, tokenizer and configuration contradict each other, or two
            tokens have one id.
    """
    ids = dict(configured)
    if tokenizer is None:
        ids = _completed({**ids, **given})
    else:
        for name, token in TOKEN_NAMES.items():
            found = tokenizer.token_to_id(token)
            if name not in given and found is not None and configured.get(name, found) != found:
                raise CheckpointError(
                    f"{source}: {name} is {configured[name]} in the configuration and {found} ({token}) in "
                    f"the tokenizer; give the right one with --tokens {name}=ID"
                )
            if found is not None:
                ids[name] = found
        ids.update(given)
    missing = [name for name in TOKEN_NAMES if name not in ids]
    if missing and tokenizer is not None:
        absent = " ".join(TOKEN_NAMES[name] for name in missing)
        options = " ".join(f"{name}=ID" for name in missing)
        raise CheckpointError(f"{source}: the tokenizer lacks {absent}; give --tokens {options}")
    if missing:
        return None
    try:
        return SpecialTokens.model_validate(ids)
    except ValidationError as error:
        raise CheckpointError(f"{source}: special tokens {ids}: {error.errors()[0]['msg']}") from error


def _completed(ids: dict[str, int]) -> dict[str, int]:
    """``ids`` with the usual numbers of [UNK] and [MASK], if the others have theirs and both are free.

    Configurations of published models do not name these two.
    """
    usual = all(ids.get(name) == _USUAL[name] for name in ("pad", "bos", "eos"))
    missing = {name: _USUAL[name] for name in ("unk", "mask") if name not in ids}
    return ids | missing if usual and not set(missing.values()) & set(ids.values()) else ids
