"""Output heads. Shape legend: m rows, D embedding width, V vocabulary.

Given targets, a head returns their loss: it reads its weights in its own forward pass only, as it must where
weights are gathered for each module in turn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.errors import ConfigError
from rxt_dist.kernels.compilation import compiled
from rxt_dist.kernels.cross_entropy import linear_cross_entropy
from rxt_dist.model.initialisation import Distribution, linear_default
from rxt_dist.model.norm import make_norm

CROSS_ENTROPY_CHUNK = 8192
"""Rows whose logits live at once: 328 MB in bf16 with a vocabulary of 20,000. Products of fewer rows leave a
part of a large GPU idle."""
Loss = tuple[torch.Tensor, torch.Tensor]
"""Summed cross-entropy (fp32 scalar) and number of correct rows (int64 scalar)."""


def vocabulary(config: ModelConfig) -> int:
    """The resolved vocabulary size.

    Raises:
        ConfigError: it is still ``auto``.
    """
    if config.vocab_size == "auto":
        raise ConfigError("model.vocab_size: found auto; valid: a number, taken from a dataset or given")
    return config.vocab_size


class LMHead(nn.Linear):
    """Logits of the next token, [m, D] -> [m, V]; biased, not tied to the embedding.

    With ``targets`` int64 [m] instead their loss, without logits that live whole.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.embed_dim, vocabulary(config))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor | Loss:  # type: ignore[override]
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, self.bias, targets, CROSS_ENTROPY_CHUNK)


class MLMHead(nn.Module):
    """Features from which masked tokens are predicted; part of pretraining only.

    Forward: hidden [m, D] -> features [m, D] (linear, exact GELU, LayerNorm). The logits are
    ``features @ weight.T + bias`` with ``weight`` [V, D] and ``bias`` [V]. With ``targets`` int64 [m] it
    gives their loss instead.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, vocab = config.embed_dim, vocabulary(config)
        self.dense = nn.Linear(width, width)
        self.norm = make_norm("layer", width)
        self.weight = nn.Parameter(torch.empty(vocab, width))
        self.bias = nn.Parameter(torch.empty(vocab))

    def initial_distributions(self) -> dict[str, Distribution]:
        return dict.fromkeys(("weight", "bias"), linear_default(self.weight.shape[1]))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor | Loss:
        features = self._features(hidden)
        if targets is None:
            return features
        return linear_cross_entropy(features, self.weight, self.bias, targets, CROSS_ENTROPY_CHUNK)

    @compiled
    def _features(self, hidden: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.norm(F.gelu(self.dense(hidden)))
        return features
