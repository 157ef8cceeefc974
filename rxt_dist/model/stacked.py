"""Parameters of all layers in one tensor, for networks whose layers do not wait for each other.

Shape legend: L layers, R rows of a layer, I input width, O output width.
"""

from __future__ import annotations

import torch
from torch import nn

from rxt_dist.kernels.norm import rms_norm
from rxt_dist.model.initialisation import Constant, Distribution, linear_default


class Stacked(nn.Module):
    """Base of modules whose parameters have a leading layer dimension."""

    # What makes the initialisation draw each entry along dimension 0 from a key of its own.
    first_expert = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; asking a weight of a part would gather it, where weights are partitioned."""
        return next(self.parameters()).dtype


class StackedLinear(Stacked):
    """One linear map a layer.

    Args of forward:
        x: [L, R, I], or [1, R, I] to send the same rows through every layer's map; cast to ``dtype``,
            or to the weights' dtype when None.

    Returns [L, R, O] in that dtype.
    """

    def __init__(self, layers: int, fan_in: int, fan_out: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(layers, fan_out)) if bias else None

    def initial_distributions(self) -> dict[str, Distribution]:
        return dict.fromkeys(("weight", "bias"), linear_default(self.weight.shape[2]))

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        # Not baddbmm: on a GPU it writes the bias into every row of the result first, and reads it again.
        return self.with_bias(self.product(x, dtype))

    def product(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The map without its bias."""
        weight = self.weight if dtype is None else self.weight.to(dtype)
        rows = x.to(weight.dtype).expand(weight.shape[0], -1, -1)
        return torch.bmm(rows, weight.mT)

    def with_bias(self, product: torch.Tensor) -> torch.Tensor:
        """``product`` [L, R, O] and the bias, in the dtype of ``product``."""
        return product if self.bias is None else product + self.bias.to(product.dtype)[:, None]


class StackedRMSNorm(Stacked):
    """RMSNorm with one learned scale a layer. x [L, ..., W] -> [L, ..., W] in the wider of both dtypes."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, width))

    def initial_distributions(self) -> dict[str, Distribution]:
        return {"weight": Constant(1.0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers, width = self.weight.shape
        weight = self.weight.view(layers, *(1,) * (x.dim() - 2), width)
        return rms_norm(x, x.new_ones(width)) * weight
