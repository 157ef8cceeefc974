"""Choosing the next token.

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rxt_dist.errors import ConfigError
from rxt_dist.randomness import uniform_tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn from the model's distribution.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0: always the most probable token."""
    top_k: int | None = None
    """Only so many of the most probable tokens can be drawn (None: all)."""
    top_p: float = 1.0
    """Of those, the most probable ones up to and including the one with which their sum exceeds this."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: found {self.temperature}; valid: 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: found {self.top_k}; valid: 1 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: found {self.top_p}; valid: more than 0, at most 1")


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities of the next token, float64 [B, V], from logits [B, V] of any dtype.

    Temperature first, then ``top_k``, then ``top_p`` of what is left. Tokens that were filtered out have
    probability 0 exactly; of equally probable tokens those with smaller ids are kept. Temperature 0 gives
    the most probable token probability 1. A row with a NaN, or an infinite maximum, gives NaN.
    """
    logits = logits.double()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # before the division: 0 / temperature is 0
    if sampling.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, logits.gather(-1, best).exp())
    distribution = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_k is None and sampling.top_p == 1:
        return distribution
    ranked, tokens = distribution.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked[:, sampling.top_k :] = 0.0
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        before = F.pad(ranked.cumsum(dim=-1)[:, :-1], (1, 0))
        ranked = ranked.masked_fill(before > sampling.top_p, 0.0)
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    return torch.zeros_like(ranked).scatter_(-1, tokens, ranked)


def choose(logits: torch.Tensor, sampling: Sampling, keys: torch.Tensor) -> torch.Tensor:
    """One token for each row of ``logits`` [B, V]: int64 [B], -1 for a row whose probabilities are NaN.

    ``keys`` int64 [B], as ``fold_in_tensor`` makes them, are the only randomness: equal rows with
    equal keys give equal tokens, wherever they stand in the batch.
    """
    sums = probabilities(logits, sampling).cumsum(dim=-1)
    # What is drawn is below the total by at least its 24th bit, so the search ends at a token that has a
    # probability: one without has the same sum as the token before it.
    drawn = uniform_tensor(keys).double()[:, None] * sums[:, -1:]
    tokens = torch.searchsorted(sums, drawn, right=True).squeeze(-1)
    return torch.where(sums[:, -1].isnan(), -1, tokens)
