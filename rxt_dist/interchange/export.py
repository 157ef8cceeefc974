"""Components in the published format: constructor arguments and tensors under published names.

Shape legend: L layers, B lanes, S memory slots, D embedding width, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

from rxt_dist.config import (
    AttentionConfig,
    DecoderConfig,
    EncoderConfig,
    MemoryAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from rxt_dist.config.model import INTERLAYER_VARIANTS
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.interchange.config import ACTIVATIONS, COMPONENT_DEFAULTS, HEAD_NORMS, ROPE_LAYOUTS, chosen
from rxt_dist.interchange.mapping import decoder_entries, encoder_entries, mlm_head_entries
from rxt_dist.interchange.memory import NORMS, VARIANTS, memory_attention_entries
from rxt_dist.interchange.reference import (
    STM_KEY,
    ReferenceDecoder,
    ReferenceEncoder,
    ReferenceMemoryAttention,
    ReferenceMLMHead,
    ReferenceModule,
    as_lanes,
    check_class,
    check_stored_stm,
)
from rxt_dist.model import Decoder, Encoder, MemoryAttention, MLMHead
from rxt_dist.model.heads import vocabulary
from rxt_dist.model.moe import Router
from rxt_dist.model.rope import rotary_angles, rotary_frequencies

Component = Encoder | Decoder | MLMHead | MemoryAttention

_ACTIVATION_NAMES = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
_HEAD_NORM_NAMES = {ours: name for name, ours in HEAD_NORMS.items()}
_NORM_NAMES = {ours: name for name, ours in NORMS.items()}
_VARIANT_NAMES = {variant: cls for cls, variant in reversed(VARIANTS.items())}


def export_reference(module: ReferenceModule) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The inverse of :func:`load_reference`: (constructor arguments, tensors by published name).

    What was loaded comes back with the same names, shapes, dtypes and, where nothing was trained since, bits.
    All tensors are copies, contiguous, on the device of ``module``.
    """
    tensors = {key: tensor.contiguous() for key, tensor in module.reference_tensors().items()}
    kept = {key: tensor.clone() for key, tensor in module.kept.items()}
    if not module.forms:
        return dict(module.config), {**kept, **tensors}
    state = {}
    for key, form in module.forms.items():
        state[key] = kept[key] if key in kept else tensors[key].reshape(form.shape).to(form.dtype)
    return dict(module.config), state


def reference_of(
    component: Component, config: ModelConfig, stm: torch.Tensor | None = None
) -> ReferenceModule:
    """A component of a model of ``config`` as a published one, for :func:`export_reference`.

    Args:
        component: is wrapped, not copied; stm: [L, B, S, D] or [L, S, D], the memory to store with a decoder
            or a memory attention, None to store none.

    Raises:
        ConfigError: ``config`` asks for what published components do not have.
        CheckpointError: ``stm`` has another shape.
    """
    kept = dict(_rotary_tables(component, config))
    if stm is not None and isinstance(component, Decoder | MemoryAttention):
        kept[STM_KEY] = as_lanes(stm.detach())
        check_stored_stm(kept[STM_KEY], config)
    if isinstance(component, Decoder):
        _refuse_selection_bias(component)
        entries = decoder_entries(component, list_experts=False)
        return ReferenceDecoder(component, "RxTDecoder", _decoder(config), config, entries, kept, {})
    if isinstance(component, Encoder):
        entries = encoder_entries(component)
        return ReferenceEncoder(component, "RxTEncoder", _encoder(config), config, entries, kept, {})
    if isinstance(component, MLMHead):
        arguments = {"embed_dim": config.embed_dim, "vocab_size": vocabulary(config)}
        entries = mlm_head_entries(component)
        return ReferenceMLMHead(component, "MLMHead", arguments, config, entries, kept, {})
    cls = _VARIANT_NAMES[config.memory_attention.variant]
    entries = memory_attention_entries(component)
    return ReferenceMemoryAttention(component, cls, _memory_attention(config), config, entries, kept, {})


def convert_rope_layout(
    state_dict: Mapping[str, torch.Tensor], cls: str, config: Mapping[str, Any], to: str
) -> dict[str, torch.Tensor]:
    """The tensors of a component whose rotated pairs lie in the other layout, computing the same function.

    Where only one side of an attention is rotated, the rows of the other side's projection are permuted
    inside each head: of the keys in memory cross-attention, of the queries in memory attention. Everything
    else is the same tensor as in ``state_dict``. Converting back gives the same bits.

    Args:
        state_dict, cls, config: as of :func:`load_reference`; a ``rope_layout`` in ``config`` is not looked
            at, as ``state_dict`` is in the layout that is not ``to``.
        to: ``interleaved`` or ``halves``.

    Raises:
        CheckpointError: ``to`` is unknown, or class, configuration and tensors do not fit together.
    """
    if to not in ROPE_LAYOUTS:
        raise CheckpointError(f"rope_layout is {to!r}; valid: {', '.join(ROPE_LAYOUTS)}")
    name = check_class(cls)
    values = chosen(config, {key: COMPONENT_DEFAULTS[key] for key in ("embed_dim", "att_heads", "use_nope")})
    if values["use_nope"]:
        return dict(state_dict)
    one_sided = ".attention_layers." if name in VARIANTS else ".memory_cross_attention."
    projection = ".q_proj.weight" if name in VARIANTS else ".k_proj.weight"
    return {
        key: _in_layout(key, tensor, values, to) if one_sided in key and key.endswith(projection) else tensor
        for key, tensor in state_dict.items()
    }


def _in_layout(key: str, rows: torch.Tensor, values: Mapping[str, Any], to: str) -> torch.Tensor:
    """``rows`` [heads * d, D] with the d rows of each head reordered."""
    width, heads = values["embed_dim"], values["att_heads"]
    head = width // heads
    if rows.dim() != 2 or rows.shape[0] % head or head % 2:
        valid = f"whole heads of {width} / {heads} rows"
        raise CheckpointError(
            f"{key}: found shape {tuple(rows.shape)}; expected {valid} (embed_dim / att_heads)"
        )
    pairs = (2, head // 2) if to == "interleaved" else (head // 2, 2)
    return rows.reshape(-1, *pairs, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _rotary_tables(component: Component, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tables of a component's first layer; the published loader finds those of the others in them."""
    if isinstance(component, MLMHead):
        return
    part: EncoderConfig | DecoderConfig | MemoryAttentionConfig
    if isinstance(component, MemoryAttention):
        part, place = config.memory_attention, "model.attention_layers.0"
    else:
        part = config.encoder if isinstance(component, Encoder) else config.decoder
        place = "model.layers.0.attention"
        if not part.use_rope:
            return
    frequencies = rotary_frequencies(config.embed_dim // part.heads, config.rope_base)
    yield f"{place}.rope.inv_freq", frequencies
    yield f"{place}.rope.cache", rotary_angles(torch.arange(config.seq_len), frequencies)


def _common(config: ModelConfig) -> dict[str, Any]:
    base = config.rope_base
    arguments: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "seq_len": config.seq_len,
        "stm_size": config.stm_size,
        "rope_base": int(base) if base.is_integer() else base,
    }
    # Published constructors have no such arguments: they are written for models that need them only.
    if config.rope_layout != "interleaved":
        arguments["rope_layout"] = config.rope_layout
    if config.rope_angle_dtype != "float32":
        arguments["rope_angle_dtype"] = config.rope_angle_dtype
    return arguments


def _layers(config: ModelConfig, part: EncoderConfig | DecoderConfig) -> dict[str, Any]:
    """Arguments that encoder and decoder have in common."""
    return {
        **_common(config),
        "vocab_size": vocabulary(config),
        "num_layers": part.num_layers,
        "ff_dim": part.ff_dim,
        "att_heads": part.heads,
        **_heads("att", "self_att_type", part.attention),
        "use_gated": part.gated_ff,
        "ff_activation": _ACTIVATION_NAMES[part.activation],
        "use_rms_norm": config.norm == "rms",
        "use_nope": not part.use_rope,
        "use_attention_output_bias": part.attention.output_bias,
        "use_gated_attention": part.attention.gated,
    }


def _heads(prefix: str, type_key: str, attention: AttentionConfig) -> dict[str, Any]:
    return {
        type_key: "sqa",
        f"{prefix}_groups": attention.kv_heads,
        f"{prefix}_query_groups": attention.query_heads,
    }


def _cross(name: str, attention: AttentionConfig, cross: AttentionConfig) -> dict[str, Any]:
    if cross.output_bias != attention.output_bias:
        _refuse(f"{name}.output_bias", cross.output_bias, "as of the self-attention")
    arguments = _heads("cross_att", "cross_att_type", cross)
    if cross.gated != attention.gated:
        arguments["use_gated_cross_attention"] = cross.gated
    return arguments


def _decoder(config: ModelConfig) -> dict[str, Any]:
    part = config.decoder
    _refuse_qk_norm("decoder.attention", part.attention)
    _refuse_qk_norm("decoder.cross_attention", part.cross_attention)
    arguments = {
        **_layers(config, part),
        **_cross("decoder.cross_attention", part.attention, part.cross_attention),
        "stateless_layers_config": list(part.stateless_layers) or None,
        "final_stateless_layers_config": list(part.final_stateless_layers) or None,
        "dense_layer_dim": part.dense_layer_dim,
        "use_head_norm": part.head_norm != "none",
        "use_moe": part.moe is not None,
    }
    if part.head_norm != "none":
        arguments["head_norm_type"] = _HEAD_NORM_NAMES[part.head_norm]
    if part.causal_cross:
        arguments["causal_cross"] = True
    if part.moe is not None:
        arguments |= _moe(part.moe)
    return arguments


def _refuse_selection_bias(decoder: Decoder) -> None:
    biases = [part.selection_bias for part in decoder.modules() if isinstance(part, Router)]
    if any(bias is not None and bool(bias.any()) for bias in biases):
        raise ConfigError(
            "model.decoder.moe.bias_update_rate: found selection biases other than 0, which published "
            "components do not have; valid: routers without them, or a native folder"
        )


def _moe(moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "moe_top_k": moe.top_k,
        "num_shared_experts": moe.num_shared_experts,
        "shared_expert_dim": moe.shared_expert_dim,
        "use_vectorized_moe": True,
        "moe_bias_mode": moe.bias,
        "moe_shared_experts_bias_mode": moe.shared_bias,
        "moe_use_weighted_shared_experts": moe.weighted_shared_experts,
        # With this kernel the published class makes its experts bf16 tensors, whatever is stored.
        "moe_grouped_gemm": False,
    }


def _encoder(config: ModelConfig) -> dict[str, Any]:
    part = config.encoder
    cross = part.memory_cross_attention
    _refuse_qk_norm("encoder.attention", part.attention)
    arguments = {**_layers(config, part), "skip_memory_cross_attention": cross is None}
    if cross is not None:
        _refuse_qk_norm("encoder.memory_cross_attention", cross)
        arguments |= _cross("encoder.memory_cross_attention", part.attention, cross)
    if part.reads_memory:
        arguments["reads_memory"] = True
    return arguments


def _memory_attention(config: ModelConfig) -> dict[str, Any]:
    part, gate = config.memory_attention, config.memory_attention.gate
    arguments = {
        **_common(config),
        "num_layers": config.decoder.num_layers,
        "att_heads": part.heads,
        **_heads("att", "att_type", _plain("attention", part.attention)),
        "norm_type": _NORM_NAMES[part.norm],
        "norm_init_gate": part.norm_gate_init,
        "norm_per_dim_scale": part.norm_per_dim_scale,
        "norm_decay": part.norm_decay,
        "use_gated_residual": gate.type != "off" and part.gate_residual,
        "residual_gate_type": "static" if gate.type == "off" else gate.type,
        "residual_per_slot_gate": gate.per_slot,
        "residual_gate_init": gate.init,
        "residual_gate_slot_status_type": gate.slot_status,
        "use_tanh_residual_gate": gate.activation == "tanh",
    }
    if part.variant == "simple":
        arguments["disable_residual"] = not part.residual
    if part.variant == "self":
        own = _plain("self_attention", part.self_attention or part.attention)
        arguments |= _heads("self_att", "self_att_type", own)
        arguments["use_gate_for_self_attention"] = gate.type != "off" and part.gate_self_attention
    if part.variant in INTERLAYER_VARIANTS:
        between = _plain("interlayer_attention", part.interlayer_attention or part.attention)
        arguments |= _heads("interlayer_att", "interlayer_att_type", between)
    if part.variant == "grouped_self_interlayer":
        arguments["num_groups"] = part.num_groups
    if not part.input_norm:
        arguments["input_norm"] = False
    return arguments


def _plain(field: str, attention: AttentionConfig) -> AttentionConfig:
    """``attention`` of a memory attention, which has none of the options of the others."""
    name = f"memory_attention.{field}"
    _refuse_qk_norm(name, attention)
    if attention.gated:
        _refuse(f"{name}.gated", True, "false")
    if not attention.output_bias:
        _refuse(f"{name}.output_bias", False, "true")
    return attention


def _refuse_qk_norm(name: str, attention: AttentionConfig) -> None:
    if attention.qk_norm:
        _refuse(f"{name}.qk_norm", True, "false")


def _refuse(field: str, found: bool, valid: str) -> NoReturn:
    text = str(found).lower()
    raise ConfigError(f"model.{field}: found {text}, which published components do not have; valid: {valid}")
