"""Text that comes token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_samples import EOS, FIRST_WORD, bytes_tokenizer, words, words_tokenizer
from tokenizers import Tokenizer, decoders

from rxt_dist.errors import DataError
from rxt_dist.inference.text import TextStream, encode

BYTES = bytes_tokenizer()


def byte_ids(content: bytes) -> list[int]:
    """One token a byte, also of bytes that are no text."""
    alphabet = sorted(decoders_alphabet())
    symbols = byte_symbols()
    return [FIRST_WORD + alphabet.index(symbols[byte]) for byte in content]


def decoders_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def byte_symbols() -> dict[int, str]:
    """The published byte-to-character table of byte-level BPE: printable Latin-1 stays, others follow."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_comes_when_its_last_byte_does() -> None:
    ids = byte_ids("aé日🎈!".encode())
    assert pieces(BYTES, ids) == ["a", "", "é", "", "", "日", "", "", "", "🎈", "!", ""]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_pieces_of_a_text_join_to_it(text: str) -> None:
    ids = encode(BYTES, text, "text")
    found = pieces(BYTES, ids)
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in found)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_come_as_the_whole_would(content: bytes) -> None:
    found = pieces(BYTES, byte_ids(content))
    assert "".join(found) == content.decode("utf-8", errors="replace")


def test_special_tokens_are_no_text_and_spaces_between_words_are_kept() -> None:
    tokenizer = words_tokenizer()
    ids = [FIRST_WORD, FIRST_WORD + 3, EOS]
    assert "".join(pieces(tokenizer, ids)) == words(ids[:2])


def test_a_decoder_that_strips_the_first_space_strips_no_other() -> None:
    tokenizer = words_tokenizer()
    tokenizer.decoder = decoders.Metaspace()
    ids = [FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_cannot_inject_special_tokens_and_must_be_unicode() -> None:
    tokenizer = bytes_tokenizer()
    assert min(encode(tokenizer, "[EOS][Q]", "query")) >= FIRST_WORD
    with pytest.raises(DataError, match=r"query: found '\\udc80' at character 1; valid: UTF-8 text"):
        encode(tokenizer, "a\udc80", "query")
