"""Small memory attention networks, and the same mathematics as a plain loop over layers and lanes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from model_samples import SYMMETRIC, model_config, perturb

from rxt_dist.config import ModelConfig
from rxt_dist.model import MemoryAttention, SequenceLayout
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.memory_attention import StackedAttention
from rxt_dist.model.memory_gate import MemoryGate
from rxt_dist.model.memory_norm import MixedNorm
from rxt_dist.model.stacked import StackedLinear

LAYERS, SLOTS, WIDTH, HEADS = 4, 5, 16, 4
LENGTHS = [7, 1, 3]  # of the lanes' interactions; none is the number of slots
PARTS = {"num_layers": LAYERS, "heads": HEADS, "ff_dim": 8, "attention": SYMMETRIC}
VARIANTS: dict[str, dict[str, Any]] = {
    "simple": {},
    "self": {"gate_self_attention": True, "self_attention": {"query_heads": 4, "kv_heads": 1}},
    "interlayer": {"interlayer_attention": {"query_heads": 1, "kv_heads": 2}},
    "self_interlayer": {},
    "grouped_self_interlayer": {"num_groups": 2},
}
NORMS = ("classic_rms", "rms", "adaptive", "positional", "layer")


def memory_config(variant: str = "self_interlayer", **fields: Any) -> ModelConfig:
    """A 4-layer model of width 16 and 5 slots; keyword arguments are those of the memory attention."""
    memory = {"heads": HEADS, "attention": SYMMETRIC, "variant": variant, **VARIANTS[variant], **fields}
    return model_config(
        embed_dim=WIDTH,
        stm_size=SLOTS,
        encoder=PARTS,
        decoder={**PARTS, "cross_attention": SYMMETRIC},
        memory_attention=memory,
    )


def network(config: ModelConfig) -> MemoryAttention:
    """A perturbed network in evaluation mode, whose running means differ from 1."""
    built = MemoryAttention(config)
    initialise(built, seed=0)
    perturb(built)
    for name, buffer in built.named_buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    return built.eval()


@dataclass
class Inputs:
    """What a network reads; memory and encoding take gradients."""

    stm: torch.Tensor
    encoded: torch.Tensor
    layout: SequenceLayout

    @classmethod
    def random(cls, lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 5) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        stm = torch.randn(LAYERS, len(lengths), SLOTS, WIDTH, generator=generator, dtype=dtype)
        encoded = torch.randn(LAYERS, sum(lengths), WIDTH, generator=generator, dtype=dtype)
        layout = SequenceLayout.from_lengths(lengths)
        return cls(stm.requires_grad_(), encoded.requires_grad_(), layout)

    def lane(self, lane: int) -> Inputs:
        """One lane by itself, as leaves of its own."""
        start, end = self.layout.cu_seqlens[lane : lane + 2].tolist()
        return Inputs(
            self.stm.detach()[:, lane : lane + 1].clone().requires_grad_(),
            self.encoded.detach()[:, start:end].clone().requires_grad_(),
            SequenceLayout.from_lengths([end - start]),
        )


def gradients(net: MemoryAttention, inputs: Inputs, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of ``loss`` by parameter name, and of ``stm`` and ``encoded``."""
    leaves = {**dict(net.named_parameters()), "stm": inputs.stm, "encoded": inputs.encoded}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def loop(net: MemoryAttention, inputs: Inputs) -> torch.Tensor:
    """The update, one layer and one lane after the other, in the words of the definition."""
    layers = []
    for layer in range(LAYERS):
        lanes = [_lane(net, inputs, layer, lane) for lane in range(inputs.stm.shape[1])]
        layers.append(torch.stack(lanes))
    return torch.stack(layers)


def _lane(net: MemoryAttention, inputs: Inputs, layer: int, lane: int) -> torch.Tensor:
    start, end = inputs.layout.cu_seqlens[lane : lane + 2].tolist()
    tokens = inputs.encoded[layer, start:end]
    old = _own_step(net, inputs.stm[:, lane], layer)
    source = _rms_norm(tokens, net.input_norm.weight[layer])
    new = _attend(net.attention, layer, _norm(net.norm, old, layer), source, rope_base=net.rope.base)
    return _mix(net.gate, layer, old, new) if net.residual else new


def _own_step(net: MemoryAttention, stm: torch.Tensor, layer: int) -> torch.Tensor:
    """``stm`` [L, S, D] of one lane -> [S, D], what the main attention starts from."""
    own = stm[layer]
    if net.variant == "simple":
        return own
    if net.variant == "self":
        rows = _norm(net.self_norm, own, layer)
        return _mix(net.self_gate, layer, own, _attend(net.self_attention, layer, rows, rows))
    rows = _norm(net.interlayer_norm, own, layer)
    size = LAYERS // net.groups
    first = layer // size * size
    source = _norm(net.mean_norm, stm[first : first + size].mean(0), 0)
    if net.variant != "interlayer":
        source = _mix(net.source_gate, layer, rows, source)
    return _mix(net.interlayer_gate, layer, own, _attend(net.interlayer_attention, layer, rows, source))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    eps = torch.finfo(torch.float32).eps
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _norm(norm: torch.nn.Module, x: torch.Tensor, layer: int) -> torch.Tensor:
    if not isinstance(norm, MixedNorm):
        return _rms_norm(x, norm.weight[layer])
    if norm.kind == "layer":
        y = F.layer_norm(x, (WIDTH,), norm.weight[layer], norm.bias[layer])
    else:
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        if norm.kind == "positional":
            rms = norm.ema_rms[layer]
        y = x / (rms + 1e-6).sqrt()
    share = norm.gate[layer].sigmoid()
    return share * norm.scale[layer] * y + (1 - share) * x


def _linear(linear: StackedLinear, layer: int, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight[layer], None if linear.bias is None else linear.bias[layer])


def _mix(gate: MemoryGate | None, layer: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if gate is None:
        return old + new
    config, both = gate.config, old + new
    if config.type == "static":
        z = gate.value[layer]
    elif config.type == "elementwise":
        z = gate.value[layer] * (both.mean(-1, keepdim=True) if config.per_slot else both.mean())
    else:
        status = both.mean(-1) if gate.status is None else _linear(gate.status, layer, both)[:, 0]
        z = _linear(gate.linear, layer, status)[:, None]
    if config.activation == "tanh":
        return (1 + z.tanh()) * new + (1 - z.tanh()) * old
    return z.sigmoid() * new + (1 - z.sigmoid()) * old


def _attend(
    attention: StackedAttention,
    layer: int,
    queries: torch.Tensor,
    sources: torch.Tensor,
    rope_base: float | None = None,
) -> torch.Tensor:
    width = attention.head_width
    q, k, v = (
        _linear(projection, layer, rows).unflatten(-1, (-1, width)).transpose(0, 1)
        for projection, rows in ((attention.q, queries), (attention.k, sources), (attention.v, sources))
    )
    if attention.query_norm is not None and attention.key_norm is not None:
        q = _rms_norm(q, attention.query_norm.weight[layer])
        k = _rms_norm(k, attention.key_norm.weight[layer])
    if rope_base is not None:
        k = _rotate(k, rope_base)
    heads = []
    for head in range(max(len(q), len(k))):
        query, kv = head % len(q), head if len(k) >= len(q) else head * len(k) // len(q)
        scores = q[query] @ k[kv].T / math.sqrt(width)
        heads.append(scores.softmax(-1) @ v[kv])
    joined = torch.cat(heads, dim=-1)
    if attention.gate is not None:
        joined = joined * _linear(attention.gate, layer, queries).sigmoid()
    return _linear(attention.out, layer, joined)


def _rotate(k: torch.Tensor, base: float) -> torch.Tensor:
    """Adjacent channel pairs of [H, T, d], by position times base^(-2i/d)."""
    out = torch.empty_like(k)
    for pair in range(k.shape[-1] // 2):
        angle = torch.arange(k.shape[1], dtype=torch.float64) * base ** (-2 * pair / k.shape[-1])
        cos, sin = angle.cos().to(k.dtype), angle.sin().to(k.dtype)
        even, odd = k[..., 2 * pair], k[..., 2 * pair + 1]
        out[..., 2 * pair] = even * cos - odd * sin
        out[..., 2 * pair + 1] = even * sin + odd * cos
    return out
