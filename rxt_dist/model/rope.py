"""Rotary position embedding (Su et al., 2021), on adjacent channel pairs, with fp32 angles.

Shape legend: N tokens, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of every token's angles, shared by all layers of a component.

    Attributes:
        cos, sin: fp32 [N, 1, d/2].
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, positions: torch.Tensor, head_width: int, base: float) -> Rotation:
        """Angles ``position * base^(-2i/d)`` for int64 ``positions`` [N]."""
        exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
        frequency = torch.pow(torch.full_like(exponent, base), -exponent)
        angle = positions.to(torch.float32)[:, None, None] * frequency
        return cls(angle.cos(), angle.sin())

    @cached_property
    def phasor(self) -> torch.Tensor:
        """complex64 [N, 1, d/2], cos + i sin."""
        return torch.complex(self.cos, self.sin)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate channel pairs (2i, 2i+1) of ``x`` [..., N, H, d]; same shape and dtype."""
        pairs = x.view(*x.shape[:-1], x.shape[-1] // 2, 2)
        if x.device.type == "cpu" and x.dtype == torch.float32:
            # One complex product is several times as fast on CPU; a compiled GPU graph wants the real form.
            return torch.view_as_real(torch.view_as_complex(pairs) * self.phasor).flatten(-2)
        even, odd = pairs.unbind(-1)
        cos, sin = self.cos, self.sin
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return rotated.flatten(-2).to(x.dtype)
