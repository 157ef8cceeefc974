"""Feed-forward, gated (Shazeer, 2020: GLU variants) or plain.

Shape legend: N tokens, D embedding width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Activation = Literal["silu", "gelu", "relu"]
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def activate(hidden: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
    """Gated: [..., 2F], first half value, second gate -> value * act(gate) [..., F]; else act(hidden)."""
    if not gated:
        return ACTIVATIONS[activation](hidden)
    value, gate = hidden.chunk(2, dim=-1)
    return value * ACTIVATIONS[activation](gate)


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
