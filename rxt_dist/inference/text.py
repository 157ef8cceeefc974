"""Between texts and token ids."""

from __future__ import annotations

from tokenizers import Tokenizer

from rxt_dist.config import ModelConfig
from rxt_dist.config.model import SpecialTokens
from rxt_dist.errors import ConfigError, DataError

_REPLACEMENT = "\ufffd"  # what a decoder puts in the place of bytes that are no (whole) character


def special_tokens(config: ModelConfig) -> SpecialTokens:
    """The ids of the model's special tokens.

    Raises:
        ConfigError: they are still ``auto``.
    """
    if config.special_tokens == "auto":
        raise ConfigError("model.special_tokens: found auto; valid: the ids, taken from a tokenizer or given")
    return config.special_tokens


def encode(tokenizer: Tokenizer, text: str, what: str) -> list[int]:
    """Token ids of ``text``, without special tokens; ``what`` names it in the error.

    What looks like a special token is ordinary characters: ``tokenizer`` is set to that.

    Raises:
        DataError: ``text`` holds a lone surrogate, so it is no Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what}: found {text[error.start]!a} at character {error.start}; valid: UTF-8 text"
        ) from error
    tokenizer.encode_special_tokens = True
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of ``tokens``, without the special ones."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


class TextStream:
    """Text of tokens that come one by one, in pieces that end where a character ends.

    The pieces joined are the text of all tokens: bytes that are no character become U+FFFD in both.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # tokens of the last piece: some decoders treat a first token apart
        self._tokens: list[int] = []  # tokens since then

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty in the middle of a character."""
        self._tokens.append(token)
        text = self._text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._before, self._tokens = self._tokens, []
        return text

    def finish(self) -> str:
        """What is left: an incomplete character at the very end."""
        return self._text()

    def _text(self) -> str:
        known = decode(self._tokenizer, self._before)
        return decode(self._tokenizer, self._before + self._tokens)[len(known) :]
