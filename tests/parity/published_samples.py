# ruff: noqa: N806 (sizes are called by the letters of the shape legend)
"""Random components in the published format: names and shapes of every tensor, from the arguments alone.

Nothing of the package is used, so that names and shapes are checked and not only repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

Shapes = Iterator[tuple[str, tuple[int, ...]]]
MEMORY_CLASSES = (
    "RxTSimpleMemoryAttention",
    "RxTSelfMemoryAttention",
    "RxTInterlayerMemoryAttention",
    "RxTSelfInterlayerMemoryAttention",
    "RxTGroupedSelfInterlayerMemoryAttention",
)


def random_state(
    cls: str, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors of a ``cls``, off every special value; rotary tables hold garbage, as nothing may read them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes_of(cls, config):
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        kind = name.rpartition(".")[2]
        if name.endswith(("embedding.weight", "stm.memory", "rope.cache", "rope.inv_freq")):
            value = noise
        elif name.endswith("ema_rms"):
            value = 0.5 + noise.abs()
        elif "norm" in name and kind in ("weight", "scale"):
            value = 1 + 0.3 * noise
        elif kind in ("weight", "w1", "w2", "shared_w1", "shared_w2") and noise.dim() > 1:
            fan_in = shape[-2] if kind != "weight" else shape[-1]
            value = noise / math.sqrt(fan_in)
        else:
            value = 0.3 * noise
        state[name] = value
    return state


def shapes_of(cls: str, config: Mapping[str, Any]) -> Shapes:
    """(published name, shape) of every tensor that a ``cls`` of these arguments stores."""
    if cls == "MLMHead":
        width, vocab = config["embed_dim"], config["vocab_size"]
        yield from _linear("dense", width, width)
        yield from _vectors("layer_norm", width, "weight", "bias")
        yield from _linear("decoder", vocab, width)
    elif cls == "RxTDecoder":
        yield from _decoder(config)
    elif cls == "RxTEncoder":
        yield from _encoder(config)
    else:
        yield from _memory_attention(cls, config)


def _linear(name: str, out: int, width: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (out, width)
    if bias:
        yield f"{name}.bias", (out,)


def _vectors(name: str, width: int, *kinds: str) -> Shapes:
    for kind in kinds:
        yield f"{name}.{kind}", (width,)


def _heads(config: Mapping[str, Any], kind: str, groups: int, query_groups: int | None) -> tuple[int, int]:
    H = config["att_heads"]
    counts = {"mha": (H, H), "gqa": (H, groups), "mqa": (H, 1), "sqa": (query_groups or 0, groups)}
    return counts[kind]


def _attention(
    name: str, config: Mapping[str, Any], heads: tuple[int, int], *, bias: bool, gated: bool
) -> Shapes:
    D = config["embed_dim"]
    d = D // config["att_heads"]
    widest = max(heads) * d
    yield f"{name}.q_proj.weight", (heads[0] * d, D)
    yield f"{name}.k_proj.weight", (heads[1] * d, D)
    yield f"{name}.v_proj.weight", (heads[1] * d, D)
    yield from _linear(f"{name}.out_proj", D, widest, bias)
    if gated:
        yield f"{name}.gate_proj.weight", (widest, D)


def _tables(name: str, config: Mapping[str, Any]) -> Shapes:
    pairs = config["embed_dim"] // config["att_heads"] // 2
    yield f"{name}.rope.inv_freq", (pairs,)
    yield f"{name}.rope.cache", (config["seq_len"], pairs)


def _feed_forward(name: str, config: Mapping[str, Any], hidden: int) -> Shapes:
    D, gated = config["embed_dim"], config.get("use_gated", True)
    first = f"{name}.fc1.linear" if gated else f"{name}.fc1"
    yield from _linear(first, 2 * hidden if gated else hidden, D)
    yield from _linear(f"{name}.fc2", D, hidden)


def _experts(name: str, config: Mapping[str, Any], count: int, hidden: int, local: bool) -> Shapes:
    """Stacked experts, ``name`` being the prefix of the tensors' names."""
    D = config["embed_dim"]
    inner = 2 * hidden if config.get("use_gated", True) else hidden
    yield f"{name}w1", (count, D, inner)
    yield f"{name}w2", (count, hidden, D)
    if local:
        yield f"{name}b1", (count, inner)
        yield f"{name}b2", (count, D)


def _moe(name: str, config: Mapping[str, Any]) -> Shapes:
    D, E, F = config["embed_dim"], config["num_experts"], config["ff_dim"]
    S = config.get("num_shared_experts", 1)
    shared_dim = config.get("shared_expert_dim") or F
    yield f"{name}.router.gate.weight", (E, D)
    if S > 1:
        yield f"{name}.shared_expert_gate.weight", (S, D)
    if not config.get("use_vectorized_moe", True):
        for e in range(E):
            yield from _feed_forward(f"{name}.experts.{e}", config, F)
        for s in range(S):
            yield from _feed_forward(f"{name}.shared_experts.{s}", config, shared_dim)
        return
    bias = config.get("moe_bias_mode", "global")
    yield from _experts(f"{name}.", config, E, F, bias == "local")
    if bias == "global":
        yield f"{name}.global_bias", (D,)
    if S == 1:
        yield from _feed_forward(f"{name}.shared_expert", config, shared_dim)
    elif S > 1:
        shared_bias = config.get("moe_shared_experts_bias_mode", "local")
        yield from _experts(f"{name}.shared_", config, S, shared_dim, shared_bias == "local")
        if shared_bias == "global":
            yield f"{name}.shared_experts_bias", (D,)


def _layer(name: str, config: Mapping[str, Any], kind: str, hidden: int, *, cross: bool) -> Shapes:
    D, groups, query = config["embed_dim"], config.get("att_groups", 1), config.get("att_query_groups")
    bias, gated = config.get("use_attention_output_bias", True), config.get("use_gated_attention", False)
    heads = _heads(config, config.get("self_att_type", "sqa"), groups, query)
    yield from _attention(f"{name}.attention", config, heads, bias=bias, gated=gated)
    norms = ["norm1", "norm3"]
    if cross:
        groups = config.get("cross_att_groups") or groups
        query = config.get("cross_att_query_groups") or query
        heads = _heads(config, config.get("cross_att_type", "sqa"), groups, query)
        own = config.get("use_gated_cross_attention")
        yield from _attention(
            f"{name}.memory_cross_attention",
            config,
            heads,
            bias=bias,
            gated=gated if own is None else own,
        )
        norms += ["norm2", "stm_norm"] if config.get("stm_norm", True) else ["norm2"]
    for norm in norms:
        kinds = ("weight",) if config.get("use_rms_norm", True) else ("weight", "bias")
        yield from _vectors(f"{name}.{norm}", D, *kinds)
    if kind == "moe":
        yield from _moe(f"{name}.ff", config)
    else:
        yield from _feed_forward(f"{name}.ff", config, hidden)


def _decoder(config: Mapping[str, Any]) -> Shapes:
    D, V = config["embed_dim"], config["vocab_size"]
    yield "model.embedding.weight", (V, D)
    yield "model.stm.memory", (config["num_layers"], 1, config["stm_size"], D)
    if not config.get("use_nope", False):
        yield from _tables("model.layers.0.attention", config)
    for group in ("stateless_layers", "final_stateless_layers"):
        for i, kind in enumerate(config.get(f"{group}_config") or []):
            hidden = config["dense_layer_dim"]
            yield from _layer(f"model.{group}.{i}", config, kind, hidden, cross=False)
    kind = "moe" if config.get("use_moe", False) else "dense"
    for i in range(config["num_layers"]):
        yield from _layer(f"model.layers.{i}", config, kind, config["ff_dim"], cross=True)
    if config.get("use_head_norm", False):
        layered = config.get("head_norm_type", "layer_norm") == "layer_norm"
        yield from _vectors("model.head_norm", D, *(("weight", "bias") if layered else ("weight",)))
    yield from _linear("model.head", V, D)


def _encoder(config: Mapping[str, Any]) -> Shapes:
    cross = not config.get("skip_memory_cross_attention", False)
    yield "model.embedding.weight", (config["vocab_size"], config["embed_dim"])
    if cross or config.get("legacy_stm_in_encoder", False):
        yield "model.stm.memory", (config["num_layers"], 1, config["stm_size"], config["embed_dim"])
    if not config.get("use_nope", False):
        yield from _tables("model.layers.0.attention", config)
    for i in range(config["num_layers"]):
        yield from _layer(f"model.layers.{i}", config, "dense", config["ff_dim"], cross=cross)


def _gate(name: str, config: Mapping[str, Any]) -> Shapes:
    S, D, per_slot = config["stm_size"], config["embed_dim"], config.get("residual_per_slot_gate", True)
    if config.get("residual_gate_type", "static") != "linear":
        yield f"{name}.gate", (S, 1) if per_slot else (1,)
        return
    yield from _linear(f"{name}.gate", S if per_slot else 1, S)
    if config.get("residual_gate_slot_status_type", "mean") == "linear":
        yield from _linear(f"{name}.slot_status", 1, D)


def _memory_norm(name: str, config: Mapping[str, Any]) -> Shapes:
    S, D, kind = config["stm_size"], config["embed_dim"], config.get("norm_type", "classic-rms")
    if kind == "classic-rms":
        yield f"{name}.weight", (D,)
        return
    slots = (S,) if kind == "positional" else ()
    yield f"{name}.scale", (*slots, D if config.get("norm_per_dim_scale", False) else 1)
    yield f"{name}.gate", (*slots, 1)
    if kind in ("adaptive", "positional"):
        yield f"{name}.ema_rms", (*slots, 1)
    if kind == "layer":
        yield from _vectors(f"{name}.norm", D, "weight", "bias")


def _memory_attention(cls: str, config: Mapping[str, Any]) -> Shapes:
    L, D = config["num_layers"], config["embed_dim"]
    gated, interlayer = config.get("use_gated_residual", False), "Interlayer" in cls
    yield "model.stm.memory", (L, 1, config["stm_size"], D)
    yield from _tables("model.attention_layers.0", config)
    if interlayer:
        yield from _memory_norm("model.mean_stm_norm", config)
    parts = [("att", "attention_layers", "memory_norm_layers", "residual_gate_layers", gated)]
    if cls == "RxTSelfMemoryAttention":
        own = config.get("use_gate_for_self_attention", False)
        names = ("self_attention_layers", "self_memory_norm_layers", "self_residual_gate_layers")
        parts.append(("self_att", *names, own))
    elif interlayer:
        names = ("mean_attention_layers", "mean_memory_norm_layers", "mean_residual_gate_layers")
        parts.append(("interlayer_att", *names, gated))
    for i in range(L):
        yield f"model.memory_input_norm_layers.{i}.weight", (D,)
        for prefix, attention, norm, gate, has_gate in parts:
            groups, query = config.get(f"{prefix}_groups", 1), config.get(f"{prefix}_query_groups")
            heads = _heads(config, config.get(f"{prefix}_type", "sqa"), groups, query)
            yield from _attention(f"model.{attention}.{i}", config, heads, bias=True, gated=False)
            yield from _memory_norm(f"model.{norm}.{i}", config)
            if has_gate:
                yield from _gate(f"model.{gate}.{i}", config)
        if gated and interlayer and cls != "RxTInterlayerMemoryAttention":
            yield from _gate(f"model.interlayer_gate_layers.{i}", config)
