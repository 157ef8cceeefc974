"""Gates that mix an update into the short-term memory, for all layers at once.

Shape legend: L layers, B lanes, S STM slots, D embedding width.
"""

from __future__ import annotations

import torch
from torch import nn

from rxt_dist.config import GateConfig
from rxt_dist.model.initialisation import Constant, Distribution
from rxt_dist.model.stacked import Stacked, StackedLinear


class MemoryGate(Stacked):
    """``r * new + (1 - r) * old`` with r = sigmoid(z), or ``(1 + g) * new + (1 - g) * old`` with g = tanh(z).

    z is one number a slot, or one a lane without ``per_slot``:

    * static: learned.
    * elementwise: learned, times the mean channel of ``old + new`` (also over slots without ``per_slot``).
    * linear: a learned map over the slots of their status, which is the mean channel of ``old + new`` or a
      learned projection of it.

    Args of forward:
        old: [L, B, S, D]; new: [L, B, S, D] or [1, B, S, D], any floating dtypes.

    Returns (mixture [L, B, S, D], gate value r or g, broadcastable to [L, B, S, 1]), in fp32 unless
    ``old`` is wider; all arithmetic is in that dtype.
    """

    def __init__(self, config: GateConfig, layers: int, slots: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.value: nn.Parameter | None = None
        self.linear: StackedLinear | None = None
        self.status: StackedLinear | None = None
        if config.type == "linear":
            self.linear = StackedLinear(layers, slots, slots if config.per_slot else 1, bias=True)
            if config.slot_status == "linear":
                self.status = StackedLinear(layers, width, 1, bias=True)
        else:
            shape = (layers, slots, 1) if config.per_slot else (layers, 1)
            self.value = nn.Parameter(torch.empty(shape))

    def initial_distributions(self) -> dict[str, Distribution]:
        stated: dict[str, Distribution] = {"value": Constant(self.config.init)}
        if self.config.bias_init is not None:
            stated["linear.bias"] = Constant(self.config.bias_init)
        return stated

    def forward(self, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(old.dtype, torch.float32)
        old, new = old.to(dtype), new.to(dtype)
        value = self.value_of(old if self.config.type == "static" else self._status(old, new))
        if self.config.activation == "sigmoid":
            return torch.lerp(old, new, value), value
        return torch.addcmul(old + new, value, new - old), value

    def value_of(self, status: torch.Tensor) -> torch.Tensor:
        """The gate value for the slots' ``status`` [L, B, S], which a static gate does not look at."""
        z = self._logit(status)
        return z.sigmoid() if self.config.activation == "sigmoid" else z.tanh()

    def _logit(self, status: torch.Tensor) -> torch.Tensor:
        """z, [L, B, S, 1] or broadcastable to it."""
        dtype = status.dtype
        if self.linear is not None:
            z: torch.Tensor = self.linear(status, dtype)
            return z.unsqueeze(-1)
        assert self.value is not None
        value = self.value.to(dtype)
        value = value[:, None] if self.config.per_slot else value[:, None, None]
        if self.config.type == "static":
            return value
        return value * (status if self.config.per_slot else status.mean(-1, keepdim=True)).unsqueeze(-1)

    def _status(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """What a gate sees of each slot, [L, B, S]."""
        if self.status is None:
            return _channel_mean(old, new)
        both = old + new
        projected: torch.Tensor = self.status(both.flatten(1, 2), both.dtype)
        return projected.view(both.shape[:-1])


def _channel_mean(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Mean over D of ``old + new``, [L, B, S]."""
    # The backward of a sum is an expanded view; that of a mean writes a tensor of the input's size.
    return (old.sum(-1) + new.sum(-1)) / old.shape[-1]


def mix(
    gate: MemoryGate | None, old: torch.Tensor, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(mixture, gate value) of ``gate``; without one ``old + new`` and None."""
    if gate is None:
        return old + new, None
    mixture, value = gate(old, new)
    return mixture, value
