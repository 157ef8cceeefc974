"""The bidirectional encoder. Shape legend: L layers, N tokens, D embedding width."""

from __future__ import annotations

import torch
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.heads import vocabulary
from rxt_dist.model.layer import Layer
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.rope import Rotation


class Encoder(nn.Module):
    """Token ids -> residual stream after every layer (there is no final norm).

    Args of forward:
        tokens: int64 [N]; layout: the sequences they form.

    Returns [L, N, D]; the encoder's output proper is the last layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        part = config.encoder
        self.head_width = config.embed_dim // part.heads
        self.rope_base = config.rope_base if part.use_rope else None
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
            )
            for _ in range(part.num_layers)
        )
        for layer in self.layers:
            # The encoder never reads the memory: these weights are carried along, not trained.
            for unused in (layer.cross_norm, layer.cross_attention):
                if isinstance(unused, nn.Module):
                    unused.requires_grad_(False)

    def forward(self, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        rotation = None
        if self.rope_base is not None:
            rotation = Rotation.at(layout.positions, self.head_width, self.rope_base)
        x = self.embedding(tokens)
        outputs = []
        for layer in self.layers:
            x, _ = layer(x, layout.self_attention, rotation)
            outputs.append(x)
        return torch.stack(outputs)
