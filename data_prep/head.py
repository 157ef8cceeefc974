"""The first documents of a dataset as people read them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.rewrite import read_blocks
from rxt_dist.data.format import ROLE_ANSWER, ROLE_QUERY, ROLE_SYSTEM, ConversationTokens
from rxt_dist.data.manifest import TOKENIZER_FOLDER, Manifest, Split, load_manifest
from rxt_dist.data.tokens import load_tokenizer
from rxt_dist.errors import DataError

_ROLES = {ROLE_SYSTEM: "system", ROLE_QUERY: "query", ROLE_ANSWER: "answer"}
MAX_CHARACTERS = 1000


def head(folder: Path, split: Split, count: int) -> Iterator[str]:
    """Text of each of the first ``count`` documents: special tokens visible, long texts cut.

    Raises:
        DataError: ``count`` is not positive, or the dataset is missing or damaged.
    """
    if count < 1:
        raise DataError(f"-n is {count}; it must be at least 1")
    manifest = load_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    for number, document in enumerate(islice(_documents(folder, manifest, split), count)):
        if isinstance(document, ConversationTokens):
            lines = [f"{split} conversation {number}: {document.num_tokens} tokens"]
            for role, segment in zip(document.roles, document.segments, strict=True):
                lines.append(f"  {_ROLES[role]:<6} {_shown(tokenizer, segment)}")
        else:
            lines = [f"{split} document {number}: {len(document)} tokens", f"  {_shown(tokenizer, document)}"]
        yield "\n".join(lines)


def _documents(folder: Path, manifest: Manifest, split: Split) -> Iterator[Any]:
    for block in read_blocks(folder, manifest, split):
        for number in range(block.num_documents):
            yield block.document(number)


def _shown(tokenizer: Tokenizer, ids: Any) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    rest = len(text) - MAX_CHARACTERS
    cut = f"{text[:MAX_CHARACTERS]} ... ({rest} more characters)" if rest > 0 else text
    return "".join(_printable(character) for character in cut)


def _printable(character: str) -> str:
    """Characters that steer a terminal are spelled out."""
    if character == "\n":
        return "\n         "
    return character if unicodedata.category(character)[0] != "C" else repr(character)[1:-1]
