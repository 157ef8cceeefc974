"""What the layout costs on the disk, over the tokens themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_builder import write_dataset

from rxt_dist.data.format import ConversationTokens
from rxt_dist.data.manifest import load_manifest


def texts(tokens: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(7, 1000, tokens) for _ in range(2_000_000 // tokens)]


def talks(tokens: int, interactions: int) -> list[Any]:
    rng = np.random.default_rng(0)
    each = tokens // (2 * interactions)
    return [
        ConversationTokens(
            [rng.integers(7, 1000, each) for _ in range(2 * interactions)], [1, 2] * interactions
        )
        for _ in range(20_000)
    ]


@pytest.mark.parametrize(
    ("kind", "tokens", "interactions", "limit"),
    [
        ("text", 1024, 0, 1.02),
        ("text", 512, 0, 1.02),
        ("text", 128, 0, 1.15),
        ("conversations", 50, 1, 1.6),
        ("conversations", 50, 2, 1.6),
        ("conversations", 50, 3, 1.6),
    ],
)
def test_tars_and_indices_are_little_more_than_their_tokens(
    tmp_path: Path, kind: Any, tokens: int, interactions: int, limit: float
) -> None:
    items = texts(tokens) if kind == "text" else talks(tokens, interactions)
    folder = write_dataset(
        tmp_path / "data", kind, items, documents_per_shard=len(items), block_documents=256
    )
    payload = 2 * load_manifest(folder).counts["train"].tokens
    size = sum(path.stat().st_size for path in folder.glob("train/*"))
    assert payload < size <= limit * payload
