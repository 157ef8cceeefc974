"""Rotary position embedding (Su et al., 2021), on adjacent channel pairs.

Shape legend: N tokens, H heads, Hq query heads, Hk key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from rxt_dist.config import ModelConfig
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels.rotary_triton import rotate, rotated_heads

Layout = Literal["interleaved", "halves"]


def rotary_frequencies(head_width: int, base: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """``base^(-2i/d)`` of every channel pair i, fp32 [d/2]."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return 1.0 / torch.pow(base, exponent)


def rotary_angles(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Angles of int64 ``positions`` [N] for fp32 ``frequencies`` [d/2]: fp32 [N, d/2]."""
    return positions.to(torch.float32)[:, None] * frequencies


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of every token's angles, shared by all layers of a component.

    Attributes:
        cos, sin: [N, 1, d/2] in the dtype of the angles, contiguous.
        layout: where the members of a rotated pair go; see :meth:`apply_one_sided`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    layout: Layout = "interleaved"

    @classmethod
    def at(
        cls,
        positions: torch.Tensor,
        head_width: int,
        base: float,
        layout: Layout = "interleaved",
        dtype: torch.dtype = torch.float32,
    ) -> Rotation:
        """Angles ``position * base^(-2i/d)`` for int64 ``positions`` [N], rounded to ``dtype``."""
        frequencies = rotary_frequencies(head_width, base, positions.device)
        angle = rotary_angles(positions, frequencies)[:, None].to(dtype)
        return cls(angle.cos(), angle.sin(), layout)

    @cached_property
    def phasor(self) -> torch.Tensor:
        """complex64 [N, 1, d/2], cos + i sin."""
        return torch.complex(self.cos, self.sin)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate channel pairs (2i, 2i+1) of ``x`` [..., N, H, d]; same shape and dtype.

        For attentions that rotate queries and keys alike: their scores do not depend on the layout.
        """
        if uses_triton(x):
            return rotate(x, self.cos, self.sin, halves=False)
        return self._pairs(x).flatten(-2)

    def apply_to_heads(
        self, heads: torch.Tensor, query_heads: int, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [N, Hq, d] and keys [N, Hk, d], as :meth:`apply` rotates them, and values [N, Hk, d] of
        ``heads`` [N, Hq + 2 Hk, d], which holds them in this order."""
        if uses_triton(heads):
            return rotated_heads(heads, self.cos, self.sin, query_heads, kv_heads)
        q, k, v = torch.split(heads, [query_heads, kv_heads, kv_heads], dim=-2)
        return self.apply(q), self.apply(k), v

    def apply_one_sided(self, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`apply`, where the other side of the attention is not rotated.

        With the layout ``halves`` the first members of all rotated pairs come before all second members.
        """
        if uses_triton(x):
            return rotate(x, self.cos, self.sin, halves=self.layout == "halves")
        pairs = self._pairs(x)
        return (pairs.transpose(-1, -2) if self.layout == "halves" else pairs).flatten(-2)

    def _pairs(self, x: torch.Tensor) -> torch.Tensor:
        """The rotated pairs, [..., N, H, d/2, 2]."""
        pairs = x.view(*x.shape[:-1], x.shape[-1] // 2, 2)
        plain = x.device.type == "cpu" and x.dtype == self.cos.dtype == torch.float32
        if plain and not torch.compiler.is_compiling():
            # One complex product is several times as fast on CPU; compiled code fuses the real form.
            return torch.view_as_real(torch.view_as_complex(pairs) * self.phasor)
        even, odd = pairs.unbind(-1)
        cos, sin = self.cos, self.sin
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).to(x.dtype)


@dataclass(frozen=True)
class RopeSettings:
    """How a model rotates: what :meth:`Rotation.at` takes besides positions and sizes."""

    base: float
    layout: Layout
    round_angles: bool

    @classmethod
    def of(cls, config: ModelConfig) -> RopeSettings:
        return cls(config.rope_base, config.rope_layout, config.rope_angle_dtype == "activation")

    def rotation(self, positions: torch.Tensor, head_width: int, dtype: torch.dtype) -> Rotation:
        """The rotation at int64 ``positions`` [N] for activations of ``dtype``."""
        # In wider activations angles stay fp32: published tables are.
        rounded = self.round_angles and dtype.itemsize < torch.float32.itemsize
        return Rotation.at(positions, head_width, self.base, self.layout, dtype if rounded else torch.float32)
