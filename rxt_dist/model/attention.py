"""Self-attention and memory cross-attention with sparse query attention (SQA) head counts.

Any number of query and key/value heads may be fewer than embed_dim / d (https://arxiv.org/abs/2510.01817):
multi-head, grouped-query, multi-query, SQA and reverse SQA are all the same module.

Shape legend: N tokens, M memory rows, D embedding width, Hq query heads, Hk key/value heads,
H = max(Hq, Hk), d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rxt_dist.config import AttentionConfig
from rxt_dist.kernels.attention import AttentionLayout, attention
from rxt_dist.model.cache import KeysValues, LayerCache
from rxt_dist.model.initialisation import Distribution, Normal
from rxt_dist.model.norm import RMSNorm
from rxt_dist.model.rope import Rotation


class TokenAttention(nn.Module):
    """What both attentions of tokens share: output projection, gate and head norms.

    ``query_heads`` and ``kv_heads`` count the heads that this module holds.
    """

    def __init__(self, width: int, head_width: int, config: AttentionConfig) -> None:
        super().__init__()
        self.query_heads, self.kv_heads, self.head_width = config.query_heads, config.kv_heads, head_width
        inner = max(config.query_heads, config.kv_heads) * head_width
        self.out = nn.Linear(inner, width, bias=config.output_bias)
        self.gate = nn.Linear(width, inner, bias=False) if config.gated else None
        self.query_norm = RMSNorm(head_width) if config.qk_norm else None
        self.key_norm = RMSNorm(head_width) if config.qk_norm else None

    def initial_distributions(self) -> dict[str, Distribution]:
        return {} if self.gate is None else {"gate.weight": Normal(mean=1.0, std=0.01)}

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(*rows.shape[:-1], rows.shape[-1] // self.head_width, self.head_width)

    def _map(self, x: torch.Tensor, maps: Sequence[nn.Module]) -> Sequence[torch.Tensor]:
        """The query input ``x`` [N, D] through each of ``maps``."""
        return [one(x) for one in maps]

    def _read_tokens(
        self, x: torch.Tensor, projection: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The heads [N, heads, d] that ``projection`` makes of ``x`` [N, D], and the gate [N, H * d] before
        its sigmoid, if there is one."""
        if self.gate is None:
            return self._heads(self._map(x, [projection])[0]), None
        heads, gate = self._map(x, [projection, self.gate])
        return self._heads(heads), gate

    def _project(self, heads: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Heads [N, H, d] -> [N, D]."""
        joined = heads.flatten(-2)
        if gate is not None:
            joined = joined * torch.sigmoid(gate)
        projected: torch.Tensor = self.out(joined)
        return projected


class SelfAttention(TokenAttention):
    """Attention of a sequence to itself.

    Args of forward:
        x: [N, D], normed; layout: groups of the N rows; rotation: angles of the rows, None without RoPE.
        cache: what came before these rows, of which ``layout`` speaks too; None if nothing did.

    Returns [N, D].
    """

    def __init__(self, width: int, head_width: int, config: AttentionConfig, *, causal: bool) -> None:
        super().__init__(width, head_width, config)
        self.causal = causal
        self.qkv = nn.Linear(width, (config.query_heads + 2 * config.kv_heads) * head_width, bias=False)

    def canonical_parts(self) -> dict[str, list[tuple[str, int]]]:
        query, kv = self.query_heads * self.head_width, self.kv_heads * self.head_width
        return {"qkv.weight": [("q.weight", query), ("k.weight", kv), ("v.weight", kv)]}

    def forward(
        self,
        x: torch.Tensor,
        layout: AttentionLayout,
        rotation: Rotation | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        heads, gate = self._read_tokens(x, self.qkv)
        if self.query_norm is None and rotation is not None:
            q, k, v = rotation.apply_to_heads(heads, self.query_heads, self.kv_heads)
        else:
            q, k, v = torch.split(heads, [self.query_heads, self.kv_heads, self.kv_heads], dim=-2)
            if self.query_norm is not None and self.key_norm is not None:
                q, k = self.query_norm(q), self.key_norm(k)
            if rotation is not None:
                q, k = rotation.apply(q), rotation.apply(k)
        if cache is not None:
            k, v = cache.append(k, v)
        return self._project(attention(q, k, v, layout, causal=self.causal), gate)


class CrossAttention(TokenAttention):
    """Attention of tokens to memory rows. Queries are rotated by token position, keys are not.

    Args of forward:
        x: [N, D], normed; memory: what :meth:`read` made of the memory; layout: tokens to memory rows;
        rotation: angles of the N tokens, None without RoPE.

    Returns [N, D].
    """

    def __init__(self, width: int, head_width: int, config: AttentionConfig, *, causal: bool) -> None:
        super().__init__(width, head_width, config)
        self.causal = causal
        self.q = nn.Linear(width, config.query_heads * head_width, bias=False)
        self.kv = nn.Linear(width, 2 * config.kv_heads * head_width, bias=False)

    def canonical_parts(self) -> dict[str, list[tuple[str, int]]]:
        kv = self.kv_heads * self.head_width
        return {"kv.weight": [("k.weight", kv), ("v.weight", kv)]}

    def read(self, memory: torch.Tensor) -> KeysValues:
        """Keys and values of memory rows [M, D], normed where the model norms them."""
        k, v = torch.split(self._heads(self.kv(memory)), self.kv_heads, dim=-2)
        return KeysValues(k if self.key_norm is None else self.key_norm(k), v)

    def forward(
        self, x: torch.Tensor, memory: KeysValues, layout: AttentionLayout, rotation: Rotation | None
    ) -> torch.Tensor:
        q, gate = self._read_tokens(x, self.q)
        if self.query_norm is not None:
            q = self.query_norm(q)
        if rotation is not None:
            q = rotation.apply_one_sided(q)
        return self._project(attention(q, memory.keys, memory.values, layout, causal=self.causal), gate)
