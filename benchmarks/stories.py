"""Synthetic stories and conversations as datasets with one token a word, from which a model can learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import write_dataset
from benchmarks.workload import IDS
from data_prep.synth import SynthOptions, write_corpus
from rxt_dist.data.format import ConversationTokens
from rxt_dist.data.tokens import ANSWER, BOS, EOS, QUERY
from rxt_dist.errors import ConfigError

STORIES, CONVERSATIONS = 4000, 1000

Encode = Callable[[str], list[int]]


def write_stories(folder: Path, vocab_size: int) -> None:
    """Write datasets ``folder/text`` and ``folder/conversations`` for a model of ``vocab_size``.

    Raises:
        ConfigError: the corpus has more words.
    """
    corpus = folder / "corpus"
    write_corpus(corpus, SynthOptions(stories=STORIES, conversations=CONVERSATIONS))
    texts = [record["text"] for record in _records(corpus / "stories.jsonl")]
    talks = [record["interactions"] for record in _records(corpus / "conversations.jsonl")]
    said = [one[part] for talk in talks for one in talk for part in ("query", "answer")]
    words = sorted({word for text in (*texts, *said) for word in text.split()})
    if vocab_size < len(IDS) + len(words):
        raise ConfigError(
            f"model.vocab_size: found {vocab_size}; valid with --loss-curves: {len(IDS) + len(words)} or more"
        )
    ids = {word: len(IDS) + number for number, word in enumerate(words)}

    def encode(text: str) -> list[int]:
        return [ids[word] for word in text.split()]

    documents = [np.array([IDS[BOS], *encode(text), IDS[EOS]]) for text in texts]
    write_dataset(folder / "text", "text", documents, vocab_size=vocab_size, special_tokens=IDS)
    conversations = [_conversation(talk, encode) for talk in talks]
    target = folder / "conversations"
    write_dataset(target, "conversations", conversations, vocab_size=vocab_size, special_tokens=IDS)


def _records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _conversation(interactions: list[dict[str, str]], encode: Encode) -> ConversationTokens:
    segments = []
    for one in interactions:
        segments.append(np.array([IDS[BOS], IDS[QUERY], *encode(one["query"])]))
        segments.append(np.array([IDS[ANSWER], *encode(one["answer"]), IDS[EOS]]))
    return ConversationTokens(segments, [1, 2] * len(interactions))
