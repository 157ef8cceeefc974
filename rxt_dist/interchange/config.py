"""Translate the constructor arguments in a published ``config.json`` to our model configuration.

A published component knows only itself; the parts of :class:`ModelConfig` that it does not speak of are
filled with the smallest values that fit and are not used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch

from rxt_dist.config import (
    AttentionConfig,
    DecoderConfig,
    EncoderConfig,
    GateConfig,
    MemoryAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from rxt_dist.config.base import Problem, Section
from rxt_dist.config.model import MoEBias
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
    # Not arguments of any published constructor: what changed from one published generation to the next.
    "rope_layout": "interleaved",
    "rope_angle_dtype": "float32",
    "stm_norm": None,
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
    "causal_cross": None,
    "legacy_causal_cross": None,
}
ENCODER_DEFAULTS: dict[str, Any] = {"skip_memory_cross_attention": False, "reads_memory": None}
# Known arguments without effect on the forward pass of a loaded checkpoint.
WITHOUT_EFFECT = {
    "use_flash_attention",
    "ff_dropout",
    "att_dropout",
    "interlayer_att_dropout",
    "self_att_dropout",
    "att_experts",
    "att_query_experts",
    "interlayer_att_experts",
    "interlayer_att_query_experts",
    "self_att_experts",
    "self_att_query_experts",
    "debug_mode",
    "debug_interval",
    "moe_grouped_gemm",
    "moe_use_cutlass_grouped_gemm",
    "router_amp",
    "router_dtype",
    "vectorized_moe_from_legacy",
    "legacy_stm_in_encoder",
    "use_moe_aux_loss",
    "moe_aux_loss_scale",
    "causal_cross",
    "legacy_causal_cross",
}
# Valid for arguments that have a default of another type, or a special range.
_COUNTS_OR_NONE = {
    "att_query_groups",
    "cross_att_groups",
    "cross_att_query_groups",
    "interlayer_att_query_groups",
    "self_att_query_groups",
    "shared_expert_dim",
}
_BOOLS_OR_NONE = {
    "use_gated_cross_attention",
    "stm_norm",
    "causal_cross",
    "legacy_causal_cross",
    "reads_memory",
}
_LAYER_LISTS = {"stateless_layers_config", "final_stateless_layers_config"}
_NUMBERS = {"rope_base", "norm_init_gate", "norm_decay", "residual_gate_init"}
ACTIVATIONS: dict[str, Literal["silu", "gelu", "relu"]] = {
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
}
HEAD_NORMS: dict[str, Literal["layer", "rms"]] = {"layer_norm": "layer", "rms_norm": "rms"}
_BIASES: dict[str, MoEBias] = {"local": "local", "global": "global", "off": "off"}
_GATE_ACTIVATIONS: dict[str, None] = {"sigmoid": None}
ROPE_LAYOUTS: dict[str, Literal["interleaved", "halves"]] = {
    "interleaved": "interleaved",
    "halves": "halves",
}
_ANGLE_DTYPES: dict[str, Literal["float32", "activation"]] = {
    "float32": "float32",
    "activation": "activation",
}
_Name = TypeVar("_Name")


def with_defaults(kind: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` completed by ``defaults``; keys that are unknown are dropped with a warning.

    Raises:
        CheckpointError: a value has another type than its argument, or is out of its range.
    """
    unknown = sorted(set(config) - set(defaults) - WITHOUT_EFFECT)
    if unknown:
        logger.warning("%s: ignoring unknown configuration keys: %s", kind, ", ".join(unknown))
    return chosen(config, defaults)


def chosen(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``defaults``, replaced by ``config`` where it has the same key.

    Raises:
        CheckpointError: a value has another type than its argument, or is out of its range.
    """
    known = {key: value for key, value in config.items() if key in defaults}
    for key, value in known.items():
        valid = _valid(key, value, defaults[key])
        if valid is not None:
            raise CheckpointError(f"config: {key} is {value!r}; valid: {valid}")
    return {**defaults, **known}


def _valid(key: str, value: Any, default: Any) -> str | None:
    """What would be valid for ``key``; None if ``value`` is."""
    if key in _LAYER_LISTS:
        fine = value is None or (isinstance(value, list | tuple) and {*value} <= {"dense", "moe"})
        return None if fine else "None, or a list of dense, moe"
    if value is None and key in _COUNTS_OR_NONE | _BOOLS_OR_NONE:
        return None
    if key in _BOOLS_OR_NONE or isinstance(default, bool):
        return None if isinstance(value, bool) else "True, False"
    if key in _NUMBERS:
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if key in _COUNTS_OR_NONE or isinstance(default, int):
        least = 0 if key == "num_shared_experts" else 1
        fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if fine else f"a whole number of at least {least}"
    return None


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


class Shapes:
    """Shapes of stored tensors by name; looks at those tensors alone that are asked for."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def rows(self, key: str) -> int | None:
        """Size along dimension 0; None if there is no such tensor or it is a single number."""
        shape = self._state[key].shape if key in self._state else ()
        return shape[0] if shape else None


def _self_attention(values: Mapping[str, Any], shapes: Shapes) -> AttentionConfig:
    rows = shapes.rows("model.layers.0.attention.q_proj.weight")
    query, kv = attention_heads(values, "att", "self_att_type", rows)
    if values["use_gated_attention"] or values["use_gated_cross_attention"]:
        choice(values, "gated_attention_activation", _GATE_ACTIVATIONS)
    return AttentionConfig(
        query_heads=query,
        kv_heads=kv,
        output_bias=values["use_attention_output_bias"],
        gated=values["use_gated_attention"],
    )


def _cross_attention(values: Mapping[str, Any], shapes: Shapes) -> AttentionConfig:
    place = "model.layers.0.memory_cross_attention"
    query, kv = attention_heads(values, "cross_att", "cross_att_type", shapes.rows(f"{place}.q_proj.weight"))
    gated = values["use_gated_cross_attention"]
    if gated is None:
        gated = values["use_gated_attention"]
    elif values["use_gated_attention"]:
        # False was read as "not given" by some constructors: what is stored decides.
        gated = gated or f"{place}.gate_proj.weight" in shapes
    return AttentionConfig(
        query_heads=query, kv_heads=kv, output_bias=values["use_attention_output_bias"], gated=gated
    )


def _stm_norm(values: Mapping[str, Any], shapes: Shapes) -> bool:
    stored = "model.layers.0.stm_norm.weight" in shapes
    return stored if values["stm_norm"] is None else values["stm_norm"]


def _causal_cross(values: Mapping[str, Any]) -> bool:
    given = {key: values[key] for key in ("causal_cross", "legacy_causal_cross") if values[key] is not None}
    if len(set(given.values())) > 1:
        found = " and ".join(f"{key} is {value}" for key, value in given.items())
        raise CheckpointError(f"config: {found}; valid: one of them, or the same value for both")
    return next(iter(given.values()), False)


def _moe_config(values: Mapping[str, Any]) -> MoEConfig | None:
    if not values["use_moe"]:
        return None
    shared, stacked = values["num_shared_experts"], values["use_vectorized_moe"]
    return MoEConfig(
        num_experts=values["num_experts"],
        top_k=values["moe_top_k"],
        num_shared_experts=shared,
        shared_expert_dim=values["shared_expert_dim"] if shared else None,
        bias=choice(values, "moe_bias_mode", _BIASES) if stacked else "local",
        shared_bias=choice(values, "moe_shared_experts_bias_mode", _BIASES) if stacked else "local",
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
        activation=choice(values, "ff_activation", ACTIVATIONS),
        use_rope=not values["use_nope"],
        stm_norm=_stm_norm(values, shapes),
        causal_cross=_causal_cross(values),
        head_norm=choice(values, "head_norm_type", HEAD_NORMS) if values["use_head_norm"] else "none",
        moe=_moe_config(values),
        stateless_layers=list(values["stateless_layers_config"] or []),
        final_stateless_layers=list(values["final_stateless_layers_config"] or []),
        dense_layer_dim=values["dense_layer_dim"],
    )
    encoder = EncoderConfig(
        num_layers=decoder.num_layers, heads=decoder.heads, ff_dim=decoder.ff_dim, attention=decoder.attention
    )
    return model_of(values, encoder, decoder)


def encoder_config(values: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The model of a published encoder."""
    cross = None if values["skip_memory_cross_attention"] else _cross_attention(values, shapes)
    encoder = EncoderConfig(
        num_layers=values["num_layers"],
        heads=values["att_heads"],
        ff_dim=values["ff_dim"],
        attention=_self_attention(values, shapes),
        gated_ff=values["use_gated"],
        activation=choice(values, "ff_activation", ACTIVATIONS),
        use_rope=not values["use_nope"],
        memory_cross_attention=cross,
        stm_norm=cross is not None and _stm_norm(values, shapes),
        reads_memory=bool(values["reads_memory"]),
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
        rope_layout=choice(values, "rope_layout", ROPE_LAYOUTS),
        rope_angle_dtype=choice(values, "rope_angle_dtype", _ANGLE_DTYPES),
        encoder=encoder,
        decoder=decoder,
        memory_attention=memory_attention
        or MemoryAttentionConfig(heads=encoder.heads, attention=encoder.attention),
    )


# The sections that are built one by one, and where they are in a model.
SECTIONS: dict[str, tuple[type[Section], str]] = {
    "AttentionConfig": (AttentionConfig, ""),
    "MoEConfig": (MoEConfig, "decoder.moe"),
    "DecoderConfig": (DecoderConfig, "decoder"),
    "EncoderConfig": (EncoderConfig, "encoder"),
    "GateConfig": (GateConfig, "memory_attention.gate"),
    "MemoryAttentionConfig": (MemoryAttentionConfig, "memory_attention"),
}
# Our field -> the published argument.
_PUBLISHED = {
    "decoder.attention.kv_heads": "att_groups",
    "decoder.attention.query_heads": "att_query_groups",
    "decoder.cross_attention.kv_heads": "cross_att_groups",
    "decoder.cross_attention.query_heads": "cross_att_query_groups",
    "decoder.moe.top_k": "moe_top_k",
    "decoder.stateless_layers": "stateless_layers_config",
    "decoder.final_stateless_layers": "final_stateless_layers_config",
    "encoder.reads_memory": "reads_memory",
    "encoder.attention.kv_heads": "att_groups",
    "encoder.attention.query_heads": "att_query_groups",
    "encoder.memory_cross_attention.kv_heads": "cross_att_groups",
    "encoder.memory_cross_attention.query_heads": "cross_att_query_groups",
    "memory_attention.attention.kv_heads": "att_groups",
    "memory_attention.attention.query_heads": "att_query_groups",
    "memory_attention.interlayer_attention.kv_heads": "interlayer_att_groups",
    "memory_attention.interlayer_attention.query_heads": "interlayer_att_query_groups",
    "memory_attention.self_attention.kv_heads": "self_att_groups",
    "memory_attention.self_attention.query_heads": "self_att_query_groups",
    "memory_attention.gate.type": "use_gated_residual",
    "memory_attention.norm_decay": "norm_decay",
    "memory_attention.num_groups": "num_groups",
}


def published(problem: Problem) -> Problem:
    """``problem`` under the published name of its argument, where it has one."""
    key = "att_heads" if problem.field.endswith(".heads") else _PUBLISHED.get(problem.field)
    return problem if key is None else Problem(key, problem.message)
