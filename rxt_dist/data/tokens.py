"""The tokenizer of a dataset: loading it, its special tokens, its identity."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenizers import Tokenizer

from rxt_dist.errors import DataError

TOKENIZER_FILE = "tokenizer.json"

PAD, UNK, BOS, EOS, MASK = "[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]"
QUERY, ANSWER = "[Q]", "[A]"
NEEDED_TOKENS = (PAD, UNK, BOS, EOS, MASK, QUERY, ANSWER)
# [T] [C] [U] [I] are reserved by published models for thinking, tool calls, tool use and instructions.
SPECIAL_TOKENS = (*NEEDED_TOKENS, "[T]", "[C]", "[U]", "[I]")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load ``folder/tokenizer.json`` so that text can never inject a special token.

    A literal ``[MASK]`` in a text is encoded as ordinary characters; special tokens are only ever added
    by their id. For a dataset, ``folder`` is its ``tokenizer`` folder.

    Raises:
        DataError: the file is missing or is not a tokenizer.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(
            f"tokenizer folder {folder} has no {TOKENIZER_FILE}; make one with `rxt-data tokenizer`"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception for a bad file
        raise DataError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of :data:`SPECIAL_TOKENS`, by name; published tokenizers may lack reserved ones.

    Raises:
        DataError: the tokenizer lacks one of :data:`NEEDED_TOKENS`.
    """
    found: dict[str, int] = {}
    for name in SPECIAL_TOKENS:
        token = tokenizer.token_to_id(name)
        if token is not None:
            found[name] = token
    missing = [name for name in NEEDED_TOKENS if name not in found]
    if missing:
        needed = " ".join(NEEDED_TOKENS)
        raise DataError(f"the tokenizer lacks the special tokens {' '.join(missing)}; it must have {needed}")
    return found


def tokenizer_sha256(folder: Path) -> str:
    """SHA-256 of ``folder/tokenizer.json`` in hexadecimal.

    Raises:
        DataError: the file is missing.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(f"tokenizer folder {folder} has no {TOKENIZER_FILE}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
