"""One pre-norm transformer layer of the encoder or the decoder.

Shape legend: N tokens, M memory rows, D embedding width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from rxt_dist.config import AttentionConfig
from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.kernels.compilation import compiled
from rxt_dist.model.attention import CrossAttention, SelfAttention
from rxt_dist.model.balance import RouterSums
from rxt_dist.model.cache import KeysValues, LayerCache
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.moe import MoE
from rxt_dist.model.norm import make_norm, make_residual_norm
from rxt_dist.model.rope import Rotation


class Layer(nn.Module):
    """Self-attention, memory cross-attention where there is a memory to read, feed-forward; all residual.

    Args of forward:
        x: [N, D] residual stream; layout: groups of self-attention; rotation: None without RoPE.
        memory: [M, D] rows of this layer's memory, or what :meth:`read` made of them, and memory_layout:
            which tokens read which of them; None skips the cross-attention.
        cache: keys and values of the tokens before these; None if there are none.

    Returns ([N, D] residual stream, losses of a mixture of experts' router or None).
    """

    def __init__(
        self,
        width: int,
        head_width: int,
        attention: AttentionConfig,
        feed_forward: FeedForward | MoE,
        *,
        causal: bool,
        norm: Literal["rms", "layer"],
        cross_attention: AttentionConfig | None = None,
        causal_cross: bool = False,
        stm_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = make_residual_norm(norm, width)
        self.attention = SelfAttention(width, head_width, attention, causal=causal)
        self.cross_norm: nn.Module | None = None
        self.stm_norm: nn.Module | None = None
        self.cross_attention: CrossAttention | None = None
        if cross_attention is not None:
            self.cross_norm = make_residual_norm(norm, width)
            self.stm_norm = make_norm(norm, width) if stm_norm else None
            self.cross_attention = CrossAttention(width, head_width, cross_attention, causal=causal_cross)
        self.feed_forward_norm = make_residual_norm(norm, width)
        self.feed_forward = feed_forward

    def read(self, memory: torch.Tensor) -> KeysValues:
        """Keys and values of this layer's memory rows [M, D]; of a layer with cross-attention."""
        assert self.cross_attention is not None
        return self.cross_attention.read(memory if self.stm_norm is None else self.stm_norm(memory))

    @compiled
    def forward(
        self,
        x: torch.Tensor,
        layout: AttentionLayout,
        rotation: Rotation | None,
        memory: torch.Tensor | KeysValues | None = None,
        memory_layout: AttentionLayout | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, RouterSums | None]:
        x, normed = self.attend(x, layout, rotation, memory, memory_layout, cache)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(normed), None
        out, sums = self.feed_forward(normed)
        return x + out, sums

    def attend(
        self,
        x: torch.Tensor,
        layout: AttentionLayout,
        rotation: Rotation | None,
        memory: torch.Tensor | KeysValues | None = None,
        memory_layout: AttentionLayout | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All but the feed-forward: the residual stream [N, D], and what the feed-forward gets of it."""
        x, normed = self.attention_norm(x)
        x = x + self.attention(normed, layout, rotation, cache)
        if self.cross_attention is not None and self.cross_norm is not None and memory is not None:
            rows = memory if isinstance(memory, KeysValues) else self.read(memory)
            x, normed = self.cross_norm(x)
            x = x + self.cross_attention(normed, rows, memory_layout, rotation)
        found: tuple[torch.Tensor, torch.Tensor] = self.feed_forward_norm(x)
        return found
