"""Translate the constructor arguments in a published ``config.json`` to our model configuration.

A published component knows only itself; the parts of :class:`ModelConfig` that it does not speak of are
filled with the smallest values that fit and are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from rxt_dist.config import (
    AttentionConfig,
    DecoderConfig,
    EncoderConfig,
    MemoryAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from rxt_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

# What the published constructors use for arguments that a config.json leaves out.
COMPONENT_DEFAULTS: dict[str, Any] = {
    "num_layers": 12,
    "vocab_size": 20000,
    "embed_dim": 512,
    "ff_dim": 1536,
    "att_heads": 16,
    "seq_len": 1024,
    "stm_size": 1024,
    "self_att_type": "sqa",
    "cross_att_type": "sqa",
    "att_groups": 1,
    "att_query_groups": None,
    "cross_att_groups": None,
    "cross_att_query_groups": None,
    "use_gated": True,
    "ff_activation": "swish",
    "use_rms_norm": True,
    "use_attention_output_bias": True,
    "use_gated_attention": False,
    "use_gated_cross_attention": None,
    "gated_attention_activation": "sigmoid",
    "use_nope": False,
    "rope_base": 10000,
}
DECODER_DEFAULTS: dict[str, Any] = {
    "use_moe": False,
    "num_experts": 1,
    "moe_top_k": 1,
    "num_shared_experts": 1,
    "shared_expert_dim": None,
    "use_vectorized_moe": True,
    "moe_bias_mode": "global",
    "moe_shared_experts_bias_mode": "local",
    "moe_use_weighted_shared_experts": False,
    "use_head_norm": False,
    "head_norm_type": "layer_norm",
    "stateless_layers_config": None,
    "final_stateless_layers_config": None,
    "dense_layer_dim": 1536,
}
ENCODER_DEFAULTS: dict[str, Any] = {"skip_memory_cross_attention": False}
# Known arguments without effect on the forward pass of a loaded checkpoint.
WITHOUT_EFFECT = {
    "use_flash_attention",
    "ff_dropout",
    "att_dropout",
    "moe_grouped_gemm",
    "moe_use_cutlass_grouped_gemm",
    "router_amp",
    "router_dtype",
    "vectorized_moe_from_legacy",
    "legacy_stm_in_encoder",
    "use_moe_aux_loss",
    "moe_aux_loss_scale",
}
_ACTIVATIONS: dict[str, Literal["silu", "gelu", "relu"]] = {
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
}
_HEAD_NORMS: dict[str, Literal["layer", "rms"]] = {"layer_norm": "layer", "rms_norm": "rms"}
_Name = TypeVar("_Name")


def with_defaults(
    kind: str, config: Mapping[str, Any], defaults: Mapping[str, Any], ignored: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """``config`` completed by ``defaults``; keys that are in neither are dropped with a warning."""
    unknown = sorted(set(config) - set(defaults) - WITHOUT_EFFECT - ignored)
    if unknown:
        logger.warning("%s: ignoring unknown configuration keys: %s", kind, ", ".join(unknown))
    return {**defaults, **{key: value for key, value in config.items() if key in defaults}}


def attention_heads(
    values: Mapping[str, Any], prefix: str, type_key: str, query_rows: int | None
) -> tuple[int, int]:
    """(query heads, key/value heads) of one attention.

    Args:
        values: completed configuration; prefix: of its ``*_groups`` keys, falling back to ``att``.
        type_key: key of the attention type.
        query_rows: rows of the stored query projection; they decide where the configuration names no
            number of query heads.

    Raises:
        CheckpointError: unknown attention type, or no way to know the number of query heads.
    """
    total = values["att_heads"]
    groups = values.get(f"{prefix}_groups") or values["att_groups"]
    query_groups = values.get(f"{prefix}_query_groups") or values["att_query_groups"]
    kind = values[type_key]
    if kind == "sqa" and query_groups is None:
        if query_rows is None:
            raise CheckpointError(
                f"config: {prefix}_query_groups is missing; sqa needs a number of query heads"
            )
        query_groups = query_rows * total // values["embed_dim"]
    counts = {
        "mha": (total, total),
        "gqa": (total, groups),
        "mqa": (total, 1),
        "sqa": (query_groups, groups),
    }
    if kind not in counts:
        raise CheckpointError(f"config: {type_key} is {kind!r}; valid: {', '.join(counts)}")
    return counts[kind]


def choice(values: Mapping[str, Any], key: str, names: Mapping[str, _Name]) -> _Name:
    """Our name for the published value of ``key``.

    Raises:
        CheckpointError: the value is unknown.
    """
    if values[key] not in names:
        raise CheckpointError(f"config: {key} is {values[key]!r}; valid: {', '.join(names)}")
    return names[values[key]]


Shapes = Mapping[str, tuple[int, ...]]


def _self_attention(values: Mapping[str, Any], shapes: Shapes) -> AttentionConfig:
    rows = shapes.get("model.layers.0.attention.q_proj.weight", (None,))[0]
    query, kv = attention_heads(values, "att", "self_att_type", rows)
    return AttentionConfig(
        query_heads=query,
        kv_heads=kv,
        output_bias=values["use_attention_output_bias"],
        gated=values["use_gated_attention"],
    )


def _cross_attention(values: Mapping[str, Any], shapes: Shapes) -> AttentionConfig:
    rows = shapes.get("model.layers.0.memory_cross_attention.q_proj.weight", (None,))[0]
    query, kv = attention_heads(values, "cross_att", "cross_att_type", rows)
    gated = values["use_gated_cross_attention"]
    return AttentionConfig(
        query_heads=query,
        kv_heads=kv,
        output_bias=values["use_attention_output_bias"],
        gated=values["use_gated_attention"] if gated is None else gated,
    )


def _moe_config(values: Mapping[str, Any]) -> MoEConfig | None:
    if not values["use_moe"]:
        return None
    shared = values["num_shared_experts"]
    return MoEConfig(
        num_experts=values["num_experts"],
        top_k=values["moe_top_k"],
        num_shared_experts=shared,
        shared_expert_dim=values["shared_expert_dim"] if shared else None,
        bias=values["moe_bias_mode"] if values["use_vectorized_moe"] else "local",
        shared_bias=values["moe_shared_experts_bias_mode"] if values["use_vectorized_moe"] else "local",
        weighted_shared_experts=values["moe_use_weighted_shared_experts"] and shared > 0,
    )


def decoder_config(values: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The model of a published decoder; ``shapes`` of its tensors settle what its config leaves open."""
    decoder = DecoderConfig(
        num_layers=values["num_layers"],
        heads=values["att_heads"],
        ff_dim=values["ff_dim"],
        attention=_self_attention(values, shapes),
        cross_attention=_cross_attention(values, shapes),
        gated_ff=values["use_gated"],
        activation=choice(values, "ff_activation", _ACTIVATIONS),
        use_rope=not values["use_nope"],
        stm_norm="model.layers.0.stm_norm.weight" in shapes,
        head_norm=choice(values, "head_norm_type", _HEAD_NORMS) if values["use_head_norm"] else "none",
        moe=_moe_config(values),
        stateless_layers=values["stateless_layers_config"] or [],
        final_stateless_layers=values["final_stateless_layers_config"] or [],
        dense_layer_dim=values["dense_layer_dim"],
    )
    encoder = EncoderConfig(
        num_layers=decoder.num_layers, heads=decoder.heads, ff_dim=decoder.ff_dim, attention=decoder.attention
    )
    return model_of(values, encoder, decoder)


def encoder_config(values: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The model of a published encoder."""
    unused = None if values["skip_memory_cross_attention"] else _cross_attention(values, shapes)
    encoder = EncoderConfig(
        num_layers=values["num_layers"],
        heads=values["att_heads"],
        ff_dim=values["ff_dim"],
        attention=_self_attention(values, shapes),
        gated_ff=values["use_gated"],
        activation=choice(values, "ff_activation", _ACTIVATIONS),
        use_rope=not values["use_nope"],
        memory_cross_attention=unused,
    )
    return model_of(values, encoder, any_decoder(encoder))


def mlm_head_config(width: int, vocab_size: int) -> ModelConfig:
    """The model around a published MLM head, which is known by its shapes alone."""
    attention = AttentionConfig(query_heads=1, kv_heads=1)
    encoder = EncoderConfig(num_layers=1, heads=1, ff_dim=1, attention=attention, use_rope=False)
    values = {**COMPONENT_DEFAULTS, "embed_dim": width, "vocab_size": vocab_size}
    return model_of(values, encoder, any_decoder(encoder))


def any_decoder(encoder: EncoderConfig) -> DecoderConfig:
    """A decoder that fits ``encoder``, for components that know no decoder."""
    return DecoderConfig(
        num_layers=encoder.num_layers,
        heads=encoder.heads,
        ff_dim=encoder.ff_dim,
        attention=encoder.attention,
        cross_attention=encoder.attention,
        use_rope=encoder.use_rope,
    )


def model_of(
    values: Mapping[str, Any],
    encoder: EncoderConfig,
    decoder: DecoderConfig,
    memory_attention: MemoryAttentionConfig | None = None,
) -> ModelConfig:
    """The model around the components that a configuration speaks of."""
    return ModelConfig(
        name="reference",
        vocab_size=values["vocab_size"],
        embed_dim=values["embed_dim"],
        seq_len=values["seq_len"],
        stm_size=values["stm_size"],
        norm="rms" if values["use_rms_norm"] else "layer",
        rope_base=float(values["rope_base"]),
        encoder=encoder,
        decoder=decoder,
        memory_attention=memory_attention
        or MemoryAttentionConfig(heads=encoder.heads, attention=encoder.attention),
    )
