"""The causal decoder. Shape legend: L memory layers, N tokens, D embedding width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.model.balance import RouterSums
from rxt_dist.model.cache import KeysValues, KeyValueCache, LayerCache
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.heads import LMHead, vocabulary
from rxt_dist.model.layer import Layer
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.memory import Memory
from rxt_dist.model.moe import MoE
from rxt_dist.model.norm import make_norm
from rxt_dist.model.rope import RopeSettings


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """What a decoder pass gives.

    Attributes:
        hidden: [N, D], after the head norm where there is one; the LM head's input.
        aux_sum: fp32 scalar, sum over the N tokens of the experts' balance value, averaged over the
            mixture-of-experts layers (for the reference value without final stateless layers, which published
            models leave out); 0 where there is none.
        z_sum: the same of the router z-loss, over all layers.
    """

    hidden: torch.Tensor
    aux_sum: torch.Tensor
    z_sum: torch.Tensor


class Decoder(nn.Module):
    """Token ids and a memory -> hidden states.

    Stateless layers, then L layers of which layer i reads ``memory.states[i]``, then final stateless
    layers, then the head norm. ``memory`` None skips all cross-attention.

    Args of forward:
        tokens: int64 [N]; layout: the sequences they form; memory: states [L, M, D] and who reads them.
        cache: keys and values of the tokens before these, to which this pass adds its own; ``layout`` is
            then what :meth:`KeyValueCache.begin` made. Without gradients only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        part = config.decoder
        width = config.embed_dim
        self.head_width = width // part.heads
        self.causal_cross = part.causal_cross
        self.rope = RopeSettings.of(config) if part.use_rope else None
        self.embedding = nn.Embedding(vocabulary(config), width)
        self.stateless_layers = nn.ModuleList(_stateless(config, kind) for kind in part.stateless_layers)
        self.layers = nn.ModuleList(_memory_layer(config) for _ in range(part.num_layers))
        self.final_stateless_layers = nn.ModuleList(
            _stateless(config, kind) for kind in part.final_stateless_layers
        )
        self.ends_unbalanced = part.moe is not None and part.moe.aux_loss == "reference"
        self.head_norm = None if part.head_norm == "none" else make_norm(part.head_norm, width)
        self.lm_head = LMHead(config)

    def new_cache(self, sequences: int) -> KeyValueCache:
        """An empty cache for generating ``sequences`` sequences at once."""
        layers = len(self.stateless_layers) + len(self.layers) + len(self.final_stateless_layers)
        return KeyValueCache(layers, sequences, self.embedding.weight.device)

    def read(self, states: torch.Tensor) -> list[KeysValues]:
        """Keys and values of the memory rows [L, M, D] of every layer, to be made once and read often."""
        return [layer.read(rows) for layer, rows in zip(self.layers, states, strict=True)]  # type: ignore[operator]

    def forward(
        self,
        tokens: torch.Tensor,
        layout: SequenceLayout,
        memory: Memory | None,
        cache: KeyValueCache | None = None,
    ) -> DecoderOutput:
        groups = layout.self_attention
        x = self.embedding(tokens)
        rotation = (
            None if self.rope is None else self.rope.rotation(layout.positions, self.head_width, x.dtype)
        )
        found: list[RouterSums | None] = []
        caches: Iterator[LayerCache | None] = repeat(None) if cache is None else iter(cache.layers)
        for layer in self.stateless_layers:
            x, sums = layer(x, groups, rotation, cache=next(caches))
            found.append(sums)
        rows = None
        states: Sequence[torch.Tensor | KeysValues | None] = [None] * len(self.layers)
        if memory is not None:
            rows = memory.up_to_position(layout) if self.causal_cross else memory.layout
            states = memory.of_layers()
        for layer, state in zip(self.layers, states, strict=True):
            x, sums = layer(x, groups, rotation, state, rows, cache=next(caches))
            found.append(sums)
        for layer in self.final_stateless_layers:
            x, sums = layer(x, groups, rotation, cache=next(caches))
            found.append(sums._replace(balance=None) if sums is not None and self.ends_unbalanced else sums)
        if self.head_norm is not None:
            x = self.head_norm(x)
        present = [sums for sums in found if sums is not None]
        return DecoderOutput(x, _mean([s.balance for s in present], x), _mean([s.z for s in present], x))


def _mean(values: Iterable[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """Mean of the scalars that there are; an fp32 zero on the device of ``like`` if there is none."""
    present = [value for value in values if value is not None]
    return torch.stack(present).mean() if present else like.new_zeros((), dtype=torch.float32)


def _feed_forward(config: ModelConfig, kind: str, dense_width: int) -> FeedForward | MoE:
    part = config.decoder
    if kind == "moe" and part.moe is not None:
        return MoE(part.moe, config.embed_dim, part.ff_dim, gated=part.gated_ff, activation=part.activation)
    return FeedForward(config.embed_dim, dense_width, gated=part.gated_ff, activation=part.activation)


def _stateless(config: ModelConfig, kind: str) -> Layer:
    part = config.decoder
    return Layer(
        config.embed_dim,
        config.embed_dim // part.heads,
        part.attention,
        _feed_forward(config, kind, part.dense_layer_dim),
        causal=True,
        norm=config.norm,
    )


def _memory_layer(config: ModelConfig) -> Layer:
    part = config.decoder
    return Layer(
        config.embed_dim,
        config.embed_dim // part.heads,
        part.attention,
        _feed_forward(config, "dense" if part.moe is None else "moe", part.ff_dim),
        causal=True,
        norm=config.norm,
        cross_attention=part.cross_attention,
        causal_cross=part.causal_cross,
        stm_norm=part.stm_norm,
    )
