"""Vocabulary, special tokens and tokenizer identity come from the datasets."""

from __future__ import annotations

from typing import Any

import pytest

from rxt_dist.config import RunConfig, SpecialTokens, load_config, resolve_dataset
from rxt_dist.config.dataset import TOKEN_NAMES
from rxt_dist.errors import ConfigError

DATA = ["data.text=/data/text", "data.conversations=/data/conversations"]
IDS = {"[PAD]": 0, "[UNK]": 1, "[BOS]": 2, "[EOS]": 3, "[MASK]": 4, "[Q]": 5, "[A]": 6, "[T]": 7}


def resolve(config: RunConfig, **changes: Any) -> RunConfig:
    arguments: dict[str, Any] = {
        "vocab_size": 300,
        "special_ids": IDS,
        "tokenizer_sha256": {"text": "a" * 64},
    }
    return resolve_dataset(config, **(arguments | changes))


def refusal(config: RunConfig, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(config, **changes)
    return str(caught.value)


def test_every_special_token_has_a_name_in_the_tokenizer() -> None:
    assert set(TOKEN_NAMES) == set(SpecialTokens.model_fields)


def test_auto_values_are_filled_in_and_nothing_else_changes() -> None:
    config = load_config("tiny", DATA)
    resolved = resolve(config)
    assert resolved.model.vocab_size == 300
    assert resolved.model.special_tokens == SpecialTokens(
        pad=0, unk=1, bos=2, eos=3, mask=4, query=5, answer=6
    )
    model = resolved.model.model_copy(update={"vocab_size": "auto", "special_tokens": "auto"})
    assert resolved.model_copy(update={"model": model}) == config


def test_resolving_twice_is_the_same() -> None:
    resolved = resolve(load_config("tiny", DATA))
    assert resolve(resolved) == resolved


def test_an_explicit_vocabulary_must_match() -> None:
    resolved = resolve(load_config("tiny", [*DATA, "model.vocab_size=300"]))
    assert resolved.model.vocab_size == 300
    other = load_config("tiny", [*DATA, "model.vocab_size=400"])
    assert refusal(other) == "model.vocab_size: found 400, but the dataset has 300; valid: auto, 300"


def test_explicit_special_tokens_must_match() -> None:
    tokens = "model.special_tokens={pad: 0, unk: 1, bos: 2, eos: 3, mask: 4, query: 6, answer: 5}"
    expected = "model.special_tokens.query: found 6, but the dataset has 5; valid: auto, 5"
    assert refusal(load_config("tiny", [*DATA, tokens])) == expected


def test_datasets_share_a_tokenizer() -> None:
    config = load_config("tiny", DATA)
    resolve(config, tokenizer_sha256={"text": "a" * 64, "conversations": "a" * 64})
    text = refusal(config, tokenizer_sha256={"text": "a" * 64, "conversations": "b" * 64})
    assert "data.text (/data/text) has aaaaaaaaaaaa" in text
    assert "data.conversations (/data/conversations) has bbbbbbbbbbbb" in text
    assert "same tokenizer" in text


LANES = ["data.text=/data/text", "batch.lanes=4", "stages=[{name: smat, steps: 2}]"]


def test_datasets_of_a_memory_stage_can_be_mixed() -> None:
    config = load_config("tiny", [*LANES, "data.conversations=[{path: /a, weight: 3}, {path: /b}]"])
    assert [(str(one.path), one.weight) for one in config.data.datasets("conversations")] == [
        ("/a", 3),
        ("/b", 1),
    ]
    hashes = {"conversations.0": "a" * 64, "conversations.1": "b" * 64}
    text = refusal(config, tokenizer_sha256=hashes)
    assert "data.conversations.0 (/a) has aaaaaaaaaaaa" in text
    assert "data.conversations.1 (/b) has bbbbbbbbbbbb" in text


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (
            "[{path: /a, weight: 0}, {path: /b}]",
            "conversations.0.weight: found 0; must be greater than or equal",
        ),
        ("[{path: /a}, {path: /b, weight: -2}]", "conversations.1.weight: found -2; must be greater than"),
        ("[{path: /a, weight: 1.5}]", "conversations.0.weight: found 1.5; must be an integer"),
        (
            "[{path: /a, weight: 1001}]",
            "conversations.0.weight: found 1001; must be less than or equal to 1000",
        ),
        ("[{weight: 2}]", "conversations.0.path: missing"),
        ("[]", "conversations: found []; must be a path (text) or must have at least 1 items"),
    ],
)
def test_malformed_mixtures_are_refused(value: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [*LANES, f"data.conversations={value}"])
    assert f"data.{found}" in str(caught.value)


def test_a_tokenizer_without_special_tokens() -> None:
    ids = {name: token for name, token in IDS.items() if name not in ("[Q]", "[A]")}
    assert refusal(load_config("tiny", DATA), special_ids=ids) == "datasets: the tokenizer lacks [Q], [A]"


def test_ids_outside_the_vocabulary() -> None:
    text = refusal(load_config("tiny", DATA), special_ids=IDS | {"[A]": 300})
    assert (
        text == "datasets: model.special_tokens.answer: found 300; must be below vocab_size, valid: 0 to 299"
    )
