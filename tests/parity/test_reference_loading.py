"""Reading published checkpoints: names both ways, every variant, and what is wrong is said."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.config import (
    COMPONENT_DEFAULTS,
    DECODER_DEFAULTS,
    ENCODER_DEFAULTS,
    decoder_config,
    encoder_config,
)
from rxt_dist.interchange.mapping import collect, decoder_entries, encoder_entries
from rxt_dist.interchange.reference import ReferenceDecoder, load_reference
from rxt_dist.model import Decoder, Encoder
from rxt_dist.model.initialisation import initialise

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": 11,
    "embed_dim": 16,
    "ff_dim": 12,
    "att_heads": 4,
    "seq_len": 8,
    "stm_size": 8,
    "att_groups": 2,
    "att_query_groups": 2,
}
MOE = {"use_moe": True, "num_experts": 3, "moe_top_k": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "layer-norm": {"use_rms_norm": False, "use_head_norm": True},
    "rms-head-norm": {
        "use_head_norm": True,
        "head_norm_type": "rms_norm",
        "use_attention_output_bias": False,
    },
    "gated-cross": {"use_gated_cross_attention": True, "use_nope": True},
    "gated": {"use_gated_attention": True, "cross_att_groups": 4, "cross_att_query_groups": 1},
    "ungated-ff": {"use_gated": False, "ff_activation": "gelu"},
    "types": {"self_att_type": "mha", "cross_att_type": "mqa"},
    "moe-list": {**MOE, "use_vectorized_moe": False, "num_shared_experts": 0},
    "moe-list-shared": {**MOE, "use_vectorized_moe": False, "num_shared_experts": 2, "shared_expert_dim": 8},
    "moe-list-ungated": {**MOE, "use_vectorized_moe": False, "num_shared_experts": 1, "use_gated": False},
    "moe-stacked": {**MOE, "moe_bias_mode": "local", "num_shared_experts": 0},
    "moe-stacked-shared": {**MOE, "num_shared_experts": 3, "moe_shared_experts_bias_mode": "global"},
    "moe-off": {
        **MOE,
        "moe_bias_mode": "off",
        "num_shared_experts": 1,
        "moe_use_weighted_shared_experts": True,
    },
    "stateless": {
        **MOE,
        "stateless_layers_config": ["dense", "moe"],
        "final_stateless_layers_config": ["moe"],
    },
}


def decoder_checkpoint(config: dict[str, Any]) -> tuple[Decoder, dict[str, torch.Tensor]]:
    """A random decoder of this configuration, and its tensors under published names."""
    values = {**COMPONENT_DEFAULTS, **DECODER_DEFAULTS, **SMALL, **config}
    decoder = Decoder(decoder_config(values, {"model.layers.0.stm_norm.weight": (16,)}))
    initialise(decoder, seed=4)
    entries = decoder_entries(decoder, list_experts=not values["use_vectorized_moe"])
    return decoder, collect(entries, dict(decoder.named_parameters()))


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_round_trip(name: str) -> None:
    decoder, state = decoder_checkpoint(DECODERS[name])
    loaded = load_reference("rxlm.some.module.RxTDecoder", {**SMALL, **DECODERS[name]}, state)
    own, theirs = dict(decoder.named_parameters()), dict(loaded.module.named_parameters())
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    written = loaded.reference_tensors()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in own.values())


def test_published_layouts() -> None:
    """Names and shapes as published, not only consistent with themselves."""
    _, stacked = decoder_checkpoint(DECODERS["moe-stacked-shared"])
    shapes = {key.removeprefix("model.layers.1."): tuple(value.shape) for key, value in stacked.items()}
    assert shapes["ff.w1"] == (3, 16, 24)
    assert shapes["ff.w2"] == (3, 12, 16)
    assert shapes["ff.global_bias"] == (16,)
    assert shapes["ff.shared_w1"] == (3, 16, 24)
    assert shapes["ff.shared_expert_gate.weight"] == (3, 16)
    assert shapes["ff.shared_experts_bias"] == (16,)
    assert shapes["attention.q_proj.weight"] == (8, 16)
    _, listed = decoder_checkpoint(DECODERS["moe-list"])
    assert tuple(listed["model.layers.0.ff.experts.2.fc1.linear.weight"].shape) == (24, 16)
    _, ungated = decoder_checkpoint(DECODERS["ungated-ff"])
    assert tuple(ungated["model.layers.0.ff.fc1.weight"].shape) == (12, 16)
    _, gated = decoder_checkpoint(DECODERS["gated"])
    assert tuple(gated["model.layers.0.memory_cross_attention.gate_proj.weight"].shape) == (16, 16)


def test_list_and_stacked_experts_are_the_same_function() -> None:
    _, listed = decoder_checkpoint(DECODERS["moe-list"])
    names = {"w1": "fc1.linear.weight", "b1": "fc1.linear.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
    stacked = {key: value for key, value in listed.items() if ".experts." not in key}
    for layer in range(2):
        for short, long in names.items():
            parts = (
                [listed[f"model.layers.{layer}.ff.experts.{e}.{long}"].mT for e in range(3)]
                if "w" in short
                else [listed[f"model.layers.{layer}.ff.experts.{e}.{long}"] for e in range(3)]
            )
            stacked[f"model.layers.{layer}.ff.{short}"] = torch.stack(parts)
    first = load_reference("RxTDecoder", {**SMALL, **DECODERS["moe-list"]}, listed)
    second = load_reference("RxTDecoder", {**SMALL, **DECODERS["moe-stacked"]}, stacked)
    assert isinstance(first, ReferenceDecoder)
    assert isinstance(second, ReferenceDecoder)
    ids, stm = torch.arange(8).view(2, 4), torch.randn(2, 1, 8, 16)
    assert torch.equal(first.forward_padded(ids, stm=stm), second.forward_padded(ids, stm=stm))


def test_encoder_with_unused_cross_attention() -> None:
    values = {**COMPONENT_DEFAULTS, **ENCODER_DEFAULTS, **SMALL}
    encoder = Encoder(encoder_config(values, {}))
    initialise(encoder, seed=4)
    state = collect(encoder_entries(encoder), dict(encoder.named_parameters()))
    assert "model.layers.0.memory_cross_attention.k_proj.weight" in state
    state["model.layers.0.stm_norm.weight"] = torch.ones(16)
    loaded = load_reference("RxTEncoder", SMALL, state)
    kept = loaded.reference_tensors()["model.layers.0.memory_cross_attention.k_proj.weight"]
    assert torch.equal(kept, state["model.layers.0.memory_cross_attention.k_proj.weight"])


def test_without_stm_norm() -> None:
    _, state = decoder_checkpoint({})
    older = {key: value for key, value in state.items() if "stm_norm" not in key}
    loaded = load_reference("RxTDecoder", SMALL, older)
    assert loaded.module.layers[0].stm_norm is None


def test_query_heads_left_open_follow_the_stored_projection() -> None:
    _, state = decoder_checkpoint({"att_query_groups": 1, "cross_att_query_groups": 4})
    loaded = load_reference("RxTDecoder", {**SMALL, "att_query_groups": None}, state)
    assert loaded.module.layers[0].attention.query_heads == 1
    assert loaded.module.layers[0].cross_attention.query_heads == 4


def test_stored_memory_of_both_ages() -> None:
    _, state = decoder_checkpoint({})
    memory = torch.randn(2, 8, 16)
    for stored in (memory, memory[:, None]):
        loaded = load_reference("RxTDecoder", SMALL, {**state, "model.stm.memory": stored})
        assert isinstance(loaded, ReferenceDecoder)
        assert torch.equal(loaded.stored_stm, memory[:, None])
    with pytest.raises(CheckpointError, match=r"model\.stm\.memory: found shape \(16,\)"):
        load_reference("RxTDecoder", SMALL, {**state, "model.stm.memory": torch.zeros(16)})


def test_decoding_without_any_memory_is_refused() -> None:
    _, state = decoder_checkpoint({})
    loaded = load_reference("RxTDecoder", SMALL, state)
    assert isinstance(loaded, ReferenceDecoder)
    with pytest.raises(CheckpointError, match=r"model\.stm\.memory: missing"):
        loaded.forward_padded(torch.zeros(1, 2, dtype=torch.int64))


def test_rotary_tables_are_ignored() -> None:
    _, state = decoder_checkpoint({})
    load_reference("RxTDecoder", SMALL, {**state, "model.layers.0.attention.rope.cache": torch.zeros(8, 2)})


def test_unknown_keys_are_tolerated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    _, state = decoder_checkpoint({})
    with caplog.at_level(logging.WARNING):
        load_reference("RxTDecoder", {**SMALL, "use_flash_attention": True}, state)
        assert not caplog.records
        load_reference("RxTDecoder", {**SMALL, "use_telepathy": True}, state)
    assert "use_telepathy" in caplog.text


@pytest.mark.parametrize(
    ("key", "replacement", "message"),
    [
        ("model.head.bias", None, r"model\.head\.bias: missing from the checkpoint; .*shape \(11,\)"),
        ("model.head.bias", torch.zeros(12), r"model\.head\.bias: found shape \(12,\); expected \(11,\)"),
        (
            "model.layers.0.attention.k_proj.weight",
            torch.zeros(4, 16),
            r"layers\.0\.attention\.k_proj\.weight: found shape \(4, 16\); expected \(8, 16\)",
        ),
        ("model.extra", torch.zeros(2), r"model\.extra: found a tensor of shape \(2,\); expected no tensor"),
    ],
)
def test_wrong_tensors(key: str, replacement: torch.Tensor | None, message: str) -> None:
    _, state = decoder_checkpoint({})
    state.pop(key, None)
    if replacement is not None:
        state[key] = replacement
    with pytest.raises(CheckpointError, match=message):
        load_reference("RxTDecoder", SMALL, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_att_type": "flex"}, "self_att_type is 'flex'; valid: mha, gqa, mqa, sqa"),
        ({"ff_activation": "tanh"}, "ff_activation is 'tanh'; valid: swish"),
        ({"att_groups": 3}, "not possible: .*kv_heads"),
        ({"num_layers": "two"}, "not possible: .*num_layers"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], message: str) -> None:
    _, state = decoder_checkpoint({})
    with pytest.raises(CheckpointError, match=message):
        load_reference("RxTDecoder", {**SMALL, **change}, state)


def test_unknown_class() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.Perceptron' cannot be loaded; valid: .*RxTDecoder"):
        load_reference("a.Perceptron", {}, {})


def test_mlm_head_shapes() -> None:
    with pytest.raises(CheckpointError, match=r"decoder\.weight: missing"):
        load_reference("MLMHead", {}, {})
    state = {"decoder.weight": torch.zeros(11, 16), "decoder.bias": torch.zeros(11)}
    with pytest.raises(CheckpointError, match=r"dense\.weight: missing"):
        load_reference("MLMHead", {"embed_dim": 16, "vocab_size": 11}, state)
