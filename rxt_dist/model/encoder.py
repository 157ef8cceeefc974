"""The bidirectional encoder. Shape legend: L layers, N tokens, D embedding width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.model.cache import KeysValues
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.heads import vocabulary
from rxt_dist.model.layer import Layer
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.memory import Memory
from rxt_dist.model.rope import RopeSettings


class Encoder(nn.Module):
    """Token ids -> residual stream after every layer (there is no final norm).

    Args of forward:
        tokens: int64 [N]; layout: the sequences they form; memory: what models read whose encoder reads a
            memory, states [L, M, D] and who reads them; None for all others.

    Returns [L, N, D]; the encoder's output proper is the last layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        part = config.encoder
        self.head_width = config.embed_dim // part.heads
        self.rope = RopeSettings.of(config) if part.use_rope else None
        self.embedding = nn.Embedding(vocabulary(config), config.embed_dim)
        self.layers = nn.ModuleList(
            Layer(
                config.embed_dim,
                self.head_width,
                part.attention,
                FeedForward(config.embed_dim, part.ff_dim, gated=part.gated_ff, activation=part.activation),
                causal=False,
                norm=config.norm,
                cross_attention=part.memory_cross_attention,
                stm_norm=part.stm_norm,
            )
            for _ in range(part.num_layers)
        )
        for layer in self.layers:
            # Weights of the cross-attention are carried along, not trained.
            for untrained in (layer.cross_norm, layer.stm_norm, layer.cross_attention):
                if isinstance(untrained, nn.Module):
                    untrained.requires_grad_(False)

    def forward(
        self, tokens: torch.Tensor, layout: SequenceLayout, memory: Memory | None = None
    ) -> torch.Tensor:
        return torch.stack(self.outputs(tokens, layout, memory))

    def outputs(
        self, tokens: torch.Tensor, layout: SequenceLayout, memory: Memory | None = None
    ) -> list[torch.Tensor]:
        """The residual stream [N, D] after each layer.

        For losses of the last one alone: taken from all layers in one tensor, its gradient would be as large
        as that tensor, and zeros would be added to the gradient of every other layer.
        """
        x = self.embedding(tokens)
        rotation = (
            None if self.rope is None else self.rope.rotation(layout.positions, self.head_width, x.dtype)
        )
        outputs = []
        states: Sequence[torch.Tensor | KeysValues | None] = [None] * len(self.layers)
        rows = None
        if memory is not None:
            rows, states = memory.layout, memory.of_layers()
        for layer, state in zip(self.layers, states, strict=True):
            x, _ = layer(x, layout.self_attention, rotation, state, rows)
            outputs.append(x)
        return outputs
