"""Feed-forward, gated or plain.

Shape legend: N tokens, D embedding width, F hidden width.
"""

from __future__ import annotations

import torch
from torch import nn

from rxt_dist.kernels.activation import Activation, activate


class FeedForward(nn.Module):
    """Two biased projections around an activation. x [N, D] -> [N, D]."""

    def __init__(self, width: int, hidden: int, *, gated: bool, activation: Activation) -> None:
        super().__init__()
        self.gated, self.activation = gated, activation
        self.in_proj = nn.Linear(width, 2 * hidden if gated else hidden)
        self.out_proj = nn.Linear(hidden, width)

    def canonical_parts(self) -> dict[str, list[tuple[str, int]]]:
        if not self.gated:
            return {}
        hidden = self.out_proj.in_features
        return {
            f"in_proj.{kind}": [(f"value.{kind}", hidden), (f"gate.{kind}", hidden)]
            for kind in ("weight", "bias")
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out_proj(activate(self.in_proj(x), self.activation, self.gated))
        return out
