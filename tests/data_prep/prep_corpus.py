"""Records with awkward characters, and a writer for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STORIES = [
    {"id": "a", "text": "The little fox ran over the hill.\n\nIt was a sunny day."},
    {"id": "b", "text": "Ein Käse, zwei Käse — naïve café, 日本語 und 🦊!"},
    {"text": "no id,   many   spaces\tand\ttabs\r\nand a literal [MASK] [BOS] [Q] <|endoftext|>"},
    {"text": "\x00\x01 control \u200b characters \ufeff and a private one \ue000"},
    *(
        {"id": i, "text": f"Story {i}: " + "the fox and the hen went to town. " * (i % 5 + 1)}
        for i in range(60)
    ),
]
CONVERSATIONS = [
    {"id": "x", "interactions": [{"query": "Who are you?", "answer": "I am a fox."}]},
    {
        "system": "You are a helpful hen.",
        "interactions": [
            {"query": "[A] trick?", "answer": "No [EOS] trick."},
            {"query": "Sure?", "answer": "Sure."},
        ],
    },
    {"query": "first", "answer": "one", "interactions": [{"query": "second", "answer": "two"}]},
    *(
        {
            "id": f"c{i}",
            "interactions": [
                {"query": f"Tell me number {j} of {i}.", "answer": f"It is {j}."} for j in range(i % 4 + 1)
            ],
        }
        for i in range(40)
    ),
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
