"""Norms of the short-term memory in front of its attentions, for all layers at once.

Shape legend: L layers, B lanes, S STM slots, D embedding width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from rxt_dist.config import MemoryAttentionConfig
from rxt_dist.model.initialisation import Constant, Distribution
from rxt_dist.model.norm import LAYER_NORM_EPS
from rxt_dist.model.stacked import Stacked, StackedRMSNorm

_RMS_EPS = 1e-6


class MixedNorm(Stacked):
    """``r * scale * y + (1 - r) * x`` with ``r = sigmoid(gate)`` and y one of:

    * layer: a LayerNorm of x with its own weight and bias.
    * rms: x / sqrt(rms), rms being the root mean square of each slot.
    * adaptive: the same, in training with the running mean of rms over lanes and slots.
    * positional: the same with a running mean for each slot, in training and evaluation; scale and gate
      are then learned for each slot.

    Dividing by sqrt(rms) and not by rms is what published checkpoints were trained with.

    The running means are the only state of the memory attention: the buffer ``ema_rms``, changed by
    every forward pass in training mode, and read after that change. They are means over the lanes of this
    process, carry no gradient, and would be counted twice under activation recomputation.

    Args of forward:
        x: [L, B, S, D]; with ``layers`` = 1 also [G, B, S, D], whose entries then share the parameters.
        present: bool [B], the lanes that count in the running means; None for all.

    Returns the shape of x, in fp32 unless x is wider.
    """

    ema_rms: torch.Tensor | None

    def __init__(self, config: MemoryAttentionConfig, layers: int, slots: int, width: int) -> None:
        super().__init__()
        self.kind, self.decay, self.gate_init = config.norm, config.norm_decay, config.norm_gate_init
        per_slot = self.kind == "positional"
        shape = (layers, slots) if per_slot else (layers,)
        channels = width if config.norm_per_dim_scale else 1
        self.scale = nn.Parameter(torch.empty(*shape, channels))
        self.gate = nn.Parameter(torch.empty(*shape, 1))
        layer_norm = self.kind == "layer"
        self.weight = nn.Parameter(torch.empty(layers, width)) if layer_norm else None
        self.bias = nn.Parameter(torch.empty(layers, width)) if layer_norm else None
        running = self.kind in ("adaptive", "positional")
        self.register_buffer("ema_rms", torch.ones(*shape, 1) if running else None)

    def initial_distributions(self) -> dict[str, Distribution]:
        one = Constant(1.0)
        return {"scale": one, "gate": Constant(self.gate_init), "weight": one, "bias": Constant(0.0)}

    def reset_statistics(self) -> None:
        """Start the running means anew, from 1."""
        if self.ema_rms is not None:
            self.ema_rms.fill_(1.0)

    def forward(self, x: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        if self.weight is not None and self.bias is not None:
            y = F.layer_norm(x, (x.shape[-1],), eps=LAYER_NORM_EPS)
            y = torch.addcmul(_over_lanes(self.bias, dtype), y, _over_lanes(self.weight, dtype))
        else:
            y = x * (self._rms(x, present) + _RMS_EPS).rsqrt()
        share = _over_lanes(self.gate, dtype).sigmoid()
        return torch.lerp(x, y * _over_lanes(self.scale, dtype), share)

    def _rms(self, x: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """What each slot is divided by the root of; [L, B, S, 1] or broadcastable to it."""
        # vector_norm has gradient 0 at 0, where the square root has none.
        norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rms = norm / math.sqrt(x.shape[-1])
        if self.ema_rms is None:
            return rms
        if self.training:
            self._update(self.ema_rms, rms.detach(), present)
        elif self.kind == "adaptive":
            return rms
        return _over_lanes(self.ema_rms, x.dtype)

    def _update(self, ema: torch.Tensor, rms: torch.Tensor, present: torch.Tensor | None) -> None:
        if rms.shape[1] == 0:
            return
        weight = torch.ones_like(rms[0, :, 0, 0]) if present is None else present.to(rms.dtype)
        count = weight.sum()
        mean = (rms * weight[:, None, None]).sum(dim=1) / count.clamp_min(1.0)  # [L, S, 1]
        if self.kind == "adaptive":
            mean = mean.mean(dim=1)
        if mean.shape[0] != ema.shape[0]:
            mean = mean.mean(dim=0, keepdim=True)
        step = (1.0 - self.decay) * (count > 0)
        with torch.no_grad():
            ema.copy_(ema + step * (mean - ema))


def _over_lanes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[L, C] or [L, S, C] -> [L, 1, 1, C] or [L, 1, S, C]."""
    values = values.to(dtype)
    return values[:, None] if values.dim() == 3 else values[:, None, None]


def make_memory_norm(
    config: MemoryAttentionConfig, layers: int, slots: int, width: int
) -> StackedRMSNorm | MixedNorm:
    """The norm that ``config.norm`` names."""
    if config.norm == "classic_rms":
        return StackedRMSNorm(layers, width)
    return MixedNorm(config, layers, slots, width)


def normed(norm: StackedRMSNorm | MixedNorm, x: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """``norm`` of a memory [L, B, S, D], same shape; ``present`` as in :class:`MixedNorm`."""
    out: torch.Tensor = norm(x, present) if isinstance(norm, MixedNorm) else norm(x)
    return out
