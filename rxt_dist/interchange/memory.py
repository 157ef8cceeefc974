"""Published memory attention networks: their configuration and the names of their tensors.

A published network keeps every layer's tensors by themselves; ours are stacked over the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from rxt_dist.config import AttentionConfig, EncoderConfig, GateConfig, MemoryAttentionConfig, ModelConfig
from rxt_dist.config.model import INTERLAYER_VARIANTS, MemoryVariant
from rxt_dist.interchange.config import (
    COMPONENT_DEFAULTS,
    Shapes,
    any_decoder,
    attention_heads,
    choice,
    model_of,
)
from rxt_dist.interchange.mapping import Entry
from rxt_dist.model import MemoryAttention
from rxt_dist.model.memory_attention import StackedAttention
from rxt_dist.model.memory_gate import MemoryGate
from rxt_dist.model.memory_norm import MixedNorm
from rxt_dist.model.stacked import StackedRMSNorm

VARIANTS: dict[str, MemoryVariant] = {
    "RxTSimpleMemoryAttention": "simple",
    "RxTSelfMemoryAttention": "self",
    "RxTInterlayerMemoryAttention": "interlayer",
    "RxTSelfInterlayerMemoryAttention": "self_interlayer",
    "RxTGroupedSelfInterlayerMemoryAttention": "grouped_self_interlayer",
    "RxTAlphaMemoryAttention": "simple",
}
_SHARED_DEFAULTS = {
    key: COMPONENT_DEFAULTS[key]
    for key in (
        "num_layers",
        "embed_dim",
        "att_heads",
        "seq_len",
        "stm_size",
        "att_groups",
        "att_query_groups",
        "rope_base",
        "rope_layout",
        "rope_angle_dtype",
    )
}
_MEMORY_DEFAULTS: dict[str, Any] = {
    "att_type": "sqa",
    "norm_type": "classic-rms",
    "norm_init_gate": -2.0,
    "norm_per_dim_scale": False,
    "norm_decay": 0.9,
    "use_gated_residual": False,
    "residual_gate_type": "static",
    "residual_per_slot_gate": True,
    "residual_gate_init": 3.0,
    "residual_gate_slot_status_type": "mean",
    "use_tanh_residual_gate": True,
    # Not an argument of any published constructor: the oldest network has no such norm.
    "input_norm": True,
}
_INTERLAYER_DEFAULTS: dict[str, Any] = {
    "interlayer_att_type": "sqa",
    "interlayer_att_groups": 1,
    "interlayer_att_query_groups": None,
}
_VARIANT_DEFAULTS: dict[MemoryVariant, dict[str, Any]] = {
    "simple": {"disable_residual": False},
    "self": {
        "self_att_type": "sqa",
        "self_att_groups": 1,
        "self_att_query_groups": None,
        "use_gate_for_self_attention": False,
    },
    "interlayer": _INTERLAYER_DEFAULTS,
    "self_interlayer": _INTERLAYER_DEFAULTS,
    "grouped_self_interlayer": {**_INTERLAYER_DEFAULTS, "num_groups": 1},
}
NORMS: dict[str, Literal["classic_rms", "rms", "adaptive", "positional", "layer"]] = {
    "classic-rms": "classic_rms",
    "rms": "rms",
    "adaptive": "adaptive",
    "positional": "positional",
    "layer": "layer",
}
_GATES: dict[str, Literal["static", "elementwise", "linear"]] = {
    "static": "static",
    "elementwise": "elementwise",
    "linear": "linear",
}
_STATUS: dict[str, Literal["mean", "linear"]] = {"mean": "mean", "linear": "linear"}
# Our module -> published name of what every layer has one of.
_LAYERED = {
    "attention": "attention_layers",
    "norm": "memory_norm_layers",
    "input_norm": "memory_input_norm_layers",
    "gate": "residual_gate_layers",
    "self_attention": "self_attention_layers",
    "self_norm": "self_memory_norm_layers",
    "self_gate": "self_residual_gate_layers",
    "interlayer_attention": "mean_attention_layers",
    "interlayer_norm": "mean_memory_norm_layers",
    "interlayer_gate": "mean_residual_gate_layers",
    "source_gate": "interlayer_gate_layers",
}


def memory_defaults(variant: MemoryVariant) -> dict[str, Any]:
    """What the published constructor of ``variant`` uses for arguments that a config.json leaves out."""
    return {**_SHARED_DEFAULTS, **_MEMORY_DEFAULTS, **_VARIANT_DEFAULTS[variant]}


def memory_attention_config(variant: MemoryVariant, values: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The model of a published memory attention.

    Args:
        variant: of its class; values: completed configuration; shapes: of its tensors, which settle what
            the configuration leaves open.

    Raises:
        CheckpointError: a value is unknown.
    """
    attention = _attention(values, shapes, "att", "attention_layers")
    gated = values["use_gated_residual"] or values.get("use_gate_for_self_attention", False)
    others: dict[str, Any] = {}
    if variant in INTERLAYER_VARIANTS:
        others["interlayer_attention"] = _attention(values, shapes, "interlayer_att", "mean_attention_layers")
    if variant == "self":
        others["self_attention"] = _attention(values, shapes, "self_att", "self_attention_layers")
        others["gate_self_attention"] = values["use_gate_for_self_attention"]
        others["gate_residual"] = values["use_gated_residual"] or not values["use_gate_for_self_attention"]
    if variant == "grouped_self_interlayer":
        others["num_groups"] = values["num_groups"]
    memory = MemoryAttentionConfig(
        variant=variant,
        heads=values["att_heads"],
        attention=attention,
        norm=choice(values, "norm_type", NORMS),
        norm_gate_init=values["norm_init_gate"],
        norm_per_dim_scale=values["norm_per_dim_scale"],
        norm_decay=values["norm_decay"],
        gate=_gate(values, gated),
        residual=not values.get("disable_residual", False),
        input_norm=values["input_norm"],
        **others,
    )
    encoder = EncoderConfig(
        num_layers=values["num_layers"], heads=memory.heads, ff_dim=1, attention=attention
    )
    return model_of({**COMPONENT_DEFAULTS, **values}, encoder, any_decoder(encoder), memory)


def _attention(values: Mapping[str, Any], shapes: Shapes, prefix: str, place: str) -> AttentionConfig:
    rows = shapes.rows(f"model.{place}.0.q_proj.weight")
    own = {
        "att_heads": values["att_heads"],
        "embed_dim": values["embed_dim"],
        f"{prefix}_type": values[f"{prefix}_type"],
        "att_groups": values[f"{prefix}_groups"],
        "att_query_groups": values[f"{prefix}_query_groups"],
    }
    query, kv = attention_heads(own, "att", f"{prefix}_type", rows)
    return AttentionConfig(query_heads=query, kv_heads=kv)


def _gate(values: Mapping[str, Any], gated: bool) -> GateConfig:
    if not gated:
        return GateConfig(type="off")
    return GateConfig(
        type=choice(values, "residual_gate_type", _GATES),
        per_slot=values["residual_per_slot_gate"],
        activation="tanh" if values["use_tanh_residual_gate"] else "sigmoid",
        slot_status=choice(values, "residual_gate_slot_status_type", _STATUS),
        init=float(values["residual_gate_init"]),
    )


def memory_attention_entries(network: MemoryAttention) -> list[Entry]:
    """Entries of a memory attention, one for each layer's part of each stacked tensor."""
    entries = []
    for name, place in _LAYERED.items():
        module = getattr(network, name, None)
        if module is not None:
            for layer in range(network.layers):
                entries += [e.under(f"model.{place}.{layer}", name) for e in _parts(module, layer)]
    shared = getattr(network, "mean_norm", None)
    if shared is not None:
        entries += [e.under("model.mean_stm_norm", "mean_norm") for e in _parts(shared, 0)]
    return entries


def _parts(module: nn.Module, layer: int) -> Iterator[Entry]:
    """Published name inside the layer -> our name inside ``module``, at index ``layer`` of the stack."""
    names: dict[str, str] = {}
    if isinstance(module, StackedAttention):
        names = {f"{kind}_proj.weight": f"{kind}.weight" for kind in ("q", "k", "v", "out")}
        names["out_proj.bias"] = "out.bias"
    elif isinstance(module, StackedRMSNorm):
        names = {"weight": "weight"}
    elif isinstance(module, MixedNorm):
        names = {"scale": "scale", "gate": "gate"}
        if module.weight is not None:
            names.update({"norm.weight": "weight", "norm.bias": "bias"})
        if module.ema_rms is not None:
            names["ema_rms"] = "ema_rms"
    elif isinstance(module, MemoryGate):
        if module.linear is None:
            names = {"gate": "value"}
        else:
            names = {"gate.weight": "linear.weight", "gate.bias": "linear.bias"}
        if module.status is not None:
            names.update({"slot_status.weight": "status.weight", "slot_status.bias": "status.bias"})
    for key, name in names.items():
        yield Entry(key, name, expert=layer)
