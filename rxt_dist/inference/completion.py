"""Continuing a text, as decoders are pretrained to."""

from __future__ import annotations

from collections.abc import Iterator

from rxt_dist.errors import ConfigError, DataError
from rxt_dist.inference.decoding import continue_sequences
from rxt_dist.inference.models import check_components, tokenizer_of
from rxt_dist.inference.sampler import Sampling
from rxt_dist.inference.text import TextStream, encode, special_tokens
from rxt_dist.interchange.pretrained import Pretrained
from rxt_dist.model.stm import initial_stm
from rxt_dist.randomness import derive_key

COMPONENTS = ("decoder",)


def complete(
    pretrained: Pretrained,
    text: str,
    *,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    memory: bool = True,
) -> Iterator[str]:
    """The continuation of a document that begins with ``text``, in pieces that end where a character ends.

    Nothing is remembered. The cross-attention reads the initial memory, as in the pretraining of a decoder
    alone: the one stored with the model, else one drawn for ``seed``; with ``memory`` False it is skipped.
    It ends with [EOS], after ``max_tokens`` tokens, or at the model's ``seq_len``. ``sampling`` None: greedy.

    Raises:
        ConfigError: an argument is out of range.
        DataError: ``text`` is no Unicode text, or leaves no room within ``seq_len``.
        CheckpointError: the model has no decoder or no tokenizer, or its logits are not finite.
    """
    check_components(pretrained, COMPONENTS)
    tokenizer, config = tokenizer_of(pretrained), pretrained.model.config
    special = special_tokens(config)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens: found {max_tokens}; valid: 1 or more")
    prompt = [special.bos, *encode(tokenizer, text, "text")]
    room = config.seq_len - len(prompt)
    if room < 1:
        raise DataError(
            f"the text has {len(prompt)} tokens with [BOS]; at most {config.seq_len - 1} leave room for a "
            f"continuation within the model's seq_len of {config.seq_len}"
        )
    stm = None
    if memory:
        stm = initial_stm(config, seed) if pretrained.stm is None else pretrained.stm
    steps = continue_sequences(
        pretrained.model.decoder,
        [prompt],
        stm=stm,
        limits=[min(room, max_tokens or room)],
        end_token=special.eos,
        sampling=sampling or Sampling(),
        keys=[derive_key(seed, "sample", 0)],
    )
    stream = TextStream(tokenizer)
    return _texts(stream, (token for step in steps for _, token in step))


def _texts(stream: TextStream, tokens: Iterator[int]) -> Iterator[str]:
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if piece := stream.finish():
        yield piece
