"""Filling in masked tokens with the encoder and its masked-LM head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rxt_dist.data.tokens import MASK
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.inference.models import check_components, tokenizer_of
from rxt_dist.inference.text import encode, special_tokens
from rxt_dist.interchange.pretrained import Pretrained
from rxt_dist.model import SequenceLayout

COMPONENTS = ("encoder", "mlm_head")


@dataclass(frozen=True)
class Candidate:
    """A token for a masked place, its text, and its probability of 0 to 1."""

    token: int
    text: str
    probability: float


@torch.no_grad()
def fill_mask(pretrained: Pretrained, text: str, top: int = 5) -> list[list[Candidate]]:
    """The ``top`` most probable tokens for every ``[MASK]`` in ``text``, best first.

    A masked token stands for the space before it too, as tokens do: "a [MASK] ." masks " word".

    Raises:
        ConfigError: ``top`` is out of range.
        DataError: ``text`` has no [MASK], is no Unicode text, or is longer than ``seq_len``.
        CheckpointError: the model has no encoder, MLM head or tokenizer.
    """
    check_components(pretrained, COMPONENTS)
    tokenizer, model = tokenizer_of(pretrained), pretrained.model
    vocabulary = model.mlm_head.bias.shape[0]
    if not 1 <= top <= vocabulary:
        raise ConfigError(f"top: found {top}; valid: 1 to {vocabulary}, the size of the vocabulary")
    special = special_tokens(model.config)
    *masked, last = text.split(MASK)
    if not masked:
        raise DataError(f"the text has no {MASK}; write {MASK} in the place of each token to fill in")
    ids = [special.bos]
    for part in masked:
        ids += [*encode(tokenizer, part.removesuffix(" "), "text"), special.mask]
    ids += [*encode(tokenizer, last, "text"), special.eos]
    if len(ids) > model.config.seq_len:
        raise DataError(
            f"the text has {len(ids)} tokens with [BOS] and [EOS]; at most {model.config.seq_len} fit into "
            "the model's seq_len"
        )
    device = model.mlm_head.bias.device
    tokens = torch.tensor(ids, device=device)
    hidden = model.encoder(tokens, SequenceLayout.from_lengths([len(ids)], device))[-1]
    features = model.mlm_head(hidden[tokens == special.mask])
    logits = F.linear(features, model.mlm_head.weight, model.mlm_head.bias)
    best = torch.softmax(logits.double(), dim=-1).topk(top, dim=-1)
    return [
        [
            Candidate(token, tokenizer.decode([token], skip_special_tokens=False), probability)
            for token, probability in zip(row_tokens, row, strict=True)
        ]
        for row_tokens, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
