"""Random arguments of published components, as hypothesis strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Config = dict[str, Any]
GATES: dict[str, Config] = {
    f"{kind}{'' if per_slot else ' shared'}{' status' if status == 'linear' else ''} {activation}": {
        "use_gated_residual": True,
        "residual_gate_type": kind,
        "residual_per_slot_gate": per_slot,
        "residual_gate_slot_status_type": status,
        "use_tanh_residual_gate": activation == "tanh",
    }
    for kind, statuses in (("static", ["mean"]), ("elementwise", ["mean"]), ("linear", ["mean", "linear"]))
    for status in statuses
    for per_slot in (True, False)
    for activation in ("sigmoid", "tanh")
}

HEADS = st.sampled_from([(2, 1), (2, 2), (1, 2), (4, 2), (4, 1), (1, 4), (1, 1), (4, 4), (3, 3), (2, 4)])
FLAG = st.booleans()


@st.composite
def heads(draw: Callable[..., Any], prefix: str, type_key: str) -> Config:
    query, kv = draw(HEADS)
    if query == 3:  # stands for the other attention types, whose number of query heads follows from them
        return {type_key: draw(st.sampled_from(["mha", "gqa", "mqa"])), f"{prefix}_groups": 2}
    return {f"{prefix}_query_groups": query, f"{prefix}_groups": kv}


@st.composite
def text_configs(draw: Callable[..., Any]) -> Config:
    """Arguments that encoder and decoder have in common."""
    return {
        "num_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(8, 30)),
        "embed_dim": 4 * draw(st.sampled_from([2, 4, 6, 10])),
        "ff_dim": draw(st.integers(1, 12)),
        "att_heads": 4,
        "seq_len": draw(st.integers(8, 12)),
        "stm_size": draw(st.integers(1, 9)),
        **draw(heads("att", "self_att_type")),
        **draw(heads("cross_att", "cross_att_type")),
        "use_gated": draw(FLAG),
        "ff_activation": draw(st.sampled_from(["swish", "silu", "gelu", "relu"])),
        "use_rms_norm": draw(FLAG),
        "use_attention_output_bias": draw(FLAG),
        "use_gated_attention": draw(FLAG),
        "use_gated_cross_attention": draw(st.sampled_from([None, True, False])),
        "use_nope": draw(FLAG),
        "rope_base": draw(st.sampled_from([10000, 100, 250.5])),
        "rope_layout": draw(st.sampled_from(["interleaved", "halves"])),
        "stm_norm": draw(FLAG),
    }


@st.composite
def decoder_configs(draw: Callable[..., Any]) -> Config:
    experts = draw(st.integers(1, 5))
    config = draw(text_configs())
    kinds = ["dense"]
    if draw(FLAG):
        kinds.append("moe")
        bias = st.sampled_from(["local", "global", "off"])
        config |= {
            "use_moe": True,
            "num_experts": experts,
            "moe_top_k": draw(st.integers(1, experts)),
            "num_shared_experts": draw(st.integers(0, 3)),
            "shared_expert_dim": draw(st.sampled_from([None, 3, 8])),
            "use_vectorized_moe": draw(FLAG),
            "moe_bias_mode": draw(bias),
            "moe_shared_experts_bias_mode": draw(bias),
            "moe_use_weighted_shared_experts": draw(FLAG),
        }
    layers = st.lists(st.sampled_from(kinds), max_size=2)
    return {
        **config,
        "stateless_layers_config": draw(layers),
        "final_stateless_layers_config": draw(layers),
        "dense_layer_dim": draw(st.integers(1, 9)),
        "use_head_norm": draw(FLAG),
        "head_norm_type": draw(st.sampled_from(["layer_norm", "rms_norm"])),
        "causal_cross": draw(FLAG),
    }


@st.composite
def memory_configs(draw: Callable[..., Any]) -> Config:
    groups = draw(st.integers(1, 3))
    return {
        "num_layers": groups * draw(st.integers(1, 2)),
        "num_groups": groups,
        "embed_dim": 4 * draw(st.sampled_from([2, 4, 6, 10])),
        "att_heads": 4,
        "seq_len": draw(st.integers(8, 12)),
        "stm_size": draw(st.integers(1, 9)),
        **draw(heads("att", "att_type")),
        **draw(heads("self_att", "self_att_type")),
        **draw(heads("interlayer_att", "interlayer_att_type")),
        "rope_base": draw(st.sampled_from([10000, 100])),
        "rope_layout": draw(st.sampled_from(["interleaved", "halves"])),
        **draw(st.sampled_from(list(GATES.values()))),
        "use_gated_residual": draw(FLAG),
        "use_gate_for_self_attention": draw(FLAG),
        "norm_type": draw(st.sampled_from(["classic-rms", "rms", "adaptive", "positional", "layer"])),
        "norm_per_dim_scale": draw(FLAG),
        "norm_decay": draw(st.sampled_from([0.9, 0.5])),
    }
