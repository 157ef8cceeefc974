"""Norm modules: RMSNorm and LayerNorm over the last dimension, fp32 inside."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from rxt_dist.kernels.norm import rms_norm, rms_norm_branch
from rxt_dist.model.initialisation import Constant, Distribution

LAYER_NORM_EPS = 1e-5


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale and no bias. x [..., D] -> [..., D] in the dtype of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def initial_distributions(self) -> dict[str, Distribution]:
        return {"weight": Constant(1.0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight)


class ResidualRMSNorm(RMSNorm):
    """At the begin of a residual branch: x -> (x to go on with, its norm), see :func:`rms_norm_branch`."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return rms_norm_branch(x, self.weight)


class ResidualLayerNorm(nn.LayerNorm):
    """As :class:`ResidualRMSNorm`."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x, super().forward(x)


def make_norm(kind: Literal["rms", "layer"], width: int) -> nn.Module:
    """The norm that a configuration names."""
    return RMSNorm(width) if kind == "rms" else nn.LayerNorm(width, eps=LAYER_NORM_EPS)


def make_residual_norm(kind: Literal["rms", "layer"], width: int) -> nn.Module:
    """The same, for the begin of a residual branch: x -> (x, its norm)."""
    return ResidualRMSNorm(width) if kind == "rms" else ResidualLayerNorm(width, eps=LAYER_NORM_EPS)
