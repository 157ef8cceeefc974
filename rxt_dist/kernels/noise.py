"""Normal noise that is added where it is drawn."""

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.kernels.compilation import compiled
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton
from rxt_dist.randomness import normal_tensor

if HAS_TRITON:
    from rxt_dist.kernels.random_triton import add_normals


def with_noise(values: torch.Tensor, keys: torch.Tensor, level: float) -> torch.Tensor:
    """``values`` [..., D] with normal numbers of standard deviation ``level``, by ``keys`` int64 [...]."""
    if uses_triton(values) and values.numel():
        out: torch.Tensor = _WithNoise.apply(values, keys, level)  # type: ignore[no-untyped-call]
        return out
    return _with_noise(values, keys, level)


class _WithNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, keys: torch.Tensor, level: float) -> torch.Tensor:
        return add_normals(values.contiguous(), keys, level)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0], None, None


@compiled
def _with_noise(values: torch.Tensor, keys: torch.Tensor, level: float) -> torch.Tensor:
    return values + (normal_tensor(keys, values.shape[-1]) * level).to(values.dtype)
