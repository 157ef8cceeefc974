"""Tokenizer training and its guarantees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.records import TextRecord, sample_key
from data_prep.train_tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from rxt_dist.data.tokens import SPECIAL_TOKENS, load_tokenizer, special_ids, tokenizer_sha256
from rxt_dist.errors import DataError

Run = Callable[..., tuple[int, str, str]]


def test_special_tokens_come_first_in_order(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert " ".join(SPECIAL_TOKENS) == "[PAD] [UNK] [BOS] [EOS] [MASK] [Q] [A] [T] [C] [U] [I]"
    assert list(special_ids(tokenizer).values()) == list(range(11))
    assert tokenizer.get_vocab_size() == 400


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_any_text_round_trips_without_unknown_tokens(tokenizer_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert min(ids) >= len(SPECIAL_TOKENS)


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_cannot_inject_special_tokens(tokenizer_folder: Path, special: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    for text in (special, f"a {special} b", special * 3):
        for encoding in (tokenizer.encode(text), tokenizer.encode_batch_fast([text])[0]):
            assert min(encoding.ids) >= len(SPECIAL_TOKENS)
            assert tokenizer.decode(encoding.ids) == text


def test_every_byte_has_a_token(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("aaaa aaaa")
    train_tokenizer([tmp_path / "tiny.txt"], MIN_VOCAB_SIZE, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.get_vocab_size() == MIN_VOCAB_SIZE
    text = "".join(chr(c) for c in range(0x250)) + "\U0001f98a"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_is_deterministic(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    inputs = [corpus / name for name in ("stories.jsonl", "conversations.jsonl")]
    train_tokenizer(inputs, 400, tmp_path / "again")
    assert tokenizer_sha256(tmp_path / "again") == tokenizer_sha256(tokenizer_folder)
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["tokenizer.json"]


def test_a_small_corpus_says_how_many_entries_it_fills(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tiny.txt").write_text("aaaa aaaa")
    size = train_tokenizer([tmp_path / "tiny.txt"], 5000, tmp_path / "tokenizer")
    assert MIN_VOCAB_SIZE < size < 300
    assert f"fills only {size} of 5000" in caplog.text


def test_too_small_a_vocabulary_names_the_minimum(run: Run, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--input", corpus / "stories.jsonl", "--output", tmp_path / "out")
    code, _, error = run("tokenizer", *arguments, "--vocab-size", MIN_VOCAB_SIZE - 1)
    assert code == 2
    assert error == (
        "error: --vocab-size 266 is too small: at least 267 are needed (256 bytes and 11 special tokens)\n"
    )
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    code, _, error = run(
        "tokenizer", "--input", tmp_path / "empty.txt", "--vocab-size", 300, "--output", tmp_path / "out"
    )
    assert code == 2
    assert "the corpus is empty" in error
    assert not (tmp_path / "out").exists()


def test_a_record_that_is_neither_text_nor_conversation_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"title": "?"}\n')
    code, _, error = run(
        "tokenizer", "--input", tmp_path / "bad.jsonl", "--vocab-size", 300, "--output", tmp_path / "out"
    )
    assert code == 2
    assert "bad.jsonl: line 2: the record has neither `text` nor `interactions`" in error


def test_loading_refuses_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        tokenizer_sha256(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_sample_is_the_same_for_every_order(run: Run, tmp_path: Path) -> None:
    """Words that occur in one record each: the vocabulary shows which records were drawn."""
    words = [f"{a}{b}{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    lines = [f'{{"text": "{word} {word} {word}"}}\n' for word in words]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(reversed(lines)))

    def drawn(name: str, *options: object) -> set[str]:
        output = tmp_path / f"{name}-{options}"
        inputs = ("--input", tmp_path / name)
        assert run("tokenizer", *inputs, "--vocab-size", 5000, "--output", output, *options)[0] == 0
        vocabulary = load_tokenizer(output).get_vocab()
        return {word for word in words if word in vocabulary}

    assert drawn("a.jsonl") == set(words)
    few = drawn("a.jsonl", "--sample-documents", 20)
    assert len(few) == 20
    assert drawn("b.jsonl", "--sample-documents", 20) == few
    assert few < drawn("a.jsonl", "--sample-documents", 50)
    assert drawn("a.jsonl", "--sample-documents", 1000) == set(words)


def test_a_sample_does_not_favour_what_is_held_out(tmp_path: Path) -> None:
    records = [TextRecord(f"text {i}") for i in range(2000)]
    sample = sorted(records, key=sample_key)[:200]
    held_out = sum(record.hash < 0.1 * 2**64 for record in sample)
    assert 5 < held_out < 40


def test_a_sample_needs_a_size(run: Run, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--input", corpus / "stories.jsonl", "--output", tmp_path / "out", "--vocab-size", 300)
    code, _, error = run("tokenizer", *arguments, "--sample-documents", 0)
    assert code == 2
    assert error == "error: --sample-documents is 0; it must be at least 1\n"
