"""Small datasets made the way a user makes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from data_prep.cli import main as rxt_data


@dataclass(frozen=True)
class Datasets:
    """Folders of datasets."""

    text: Path
    conversations: Path
    other_tokenizer: Path
    """The stories of ``text`` with a tokenizer of another size."""
    fewer_stories: Path
    """Another text dataset with the tokenizer of ``text``."""


def build_datasets(folder: Path) -> Datasets:
    """Generate a corpus, train two tokenizers and tokenise it into ``folder``."""
    corpus = folder / "corpus"
    stories, conversations = corpus / "stories.jsonl", corpus / "conversations.jsonl"
    _call("synth", "--output", corpus, "--conversations", 120, "--stories", 200, "--seed", 5)
    for name, vocabulary in (("tokenizer", 320), ("other-tokenizer", 300)):
        inputs = ("--input", stories, "--input", conversations)
        _call("tokenizer", *inputs, "--vocab-size", vocabulary, "--output", folder / name)
    fewer = corpus / "fewer.jsonl"
    fewer.write_text("".join(stories.read_text().splitlines(keepends=True)[:100]))
    names = ("text", "conversations", "other-tokenizer-text", "fewer-stories")
    found = Datasets(*(folder / name for name in names))
    for kind, source, tokenizer, output in (
        ("text", stories, "tokenizer", found.text),
        ("conversations", conversations, "tokenizer", found.conversations),
        ("text", stories, "other-tokenizer", found.other_tokenizer),
        ("text", fewer, "tokenizer", found.fewer_stories),
    ):
        options = ("--tokenizer", folder / tokenizer, "--output", output, "--workers", 1)
        _call("shard", kind, "--input", source, *options, "--val-fraction", 0.1)
    return found


def with_system_prompts(datasets: Datasets, folder: Path) -> Path:
    """The conversations of ``datasets``, two of three with a system prompt, as another dataset."""
    lines = (datasets.conversations.parent / "corpus" / "conversations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records):
        if number % 3:
            record["system"] = f"note that kim has the {('red', 'blue', 'teal')[number % 7 % 3]} cup ."
    source, output = folder / "prompted.jsonl", folder / "prompted"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--tokenizer", datasets.conversations.parent / "tokenizer", "--workers", 1)
    _call("shard", "conversations", "--input", source, *options, "--output", output, "--val-fraction", 0.1)
    return output


def _call(*arguments: object) -> None:
    code = rxt_data([str(argument) for argument in arguments])
    assert code == 0, f"rxt-data {' '.join(map(str, arguments))}: exit code {code}"
