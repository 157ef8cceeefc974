"""Reading published checkpoints: what may be left open or differ by age, and what is wrong is said."""

from __future__ import annotations

import logging
from typing import Any

import naive_reference as naive
import pytest
import torch
from published_samples import random_state
from test_parity_components import assert_close

from rxt_dist.errors import CheckpointError
from rxt_dist.interchange import export_reference, load_reference
from rxt_dist.interchange.reference import (
    ReferenceDecoder,
    ReferenceEncoder,
    ReferenceMemoryAttention,
)

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": 11,
    "embed_dim": 16,
    "ff_dim": 12,
    "att_heads": 4,
    "seq_len": 8,
    "stm_size": 6,
    "att_groups": 2,
    "att_query_groups": 2,
}
MOE = {"use_moe": True, "num_experts": 3, "moe_top_k": 2}
MEMORY: dict[str, Any] = {
    key: SMALL[key]
    for key in (
        "num_layers",
        "embed_dim",
        "att_heads",
        "seq_len",
        "stm_size",
        "att_groups",
        "att_query_groups",
    )
}
SELF_INTERLAYER = {**MEMORY, "interlayer_att_groups": 1, "interlayer_att_query_groups": 4}
LINEAR_GATE = {"use_gated_residual": True, "residual_gate_type": "linear"}
IDS = torch.arange(10).view(2, 5)
STM_KEY = "model.stm.memory"


def decoder(
    config: dict[str, Any], state: dict[str, torch.Tensor], cls: str = "RxTDecoder"
) -> ReferenceDecoder:
    loaded = load_reference(cls, config, state)
    assert isinstance(loaded, ReferenceDecoder)
    return loaded


def memory(cls: str, config: dict[str, Any], state: dict[str, torch.Tensor]) -> ReferenceMemoryAttention:
    loaded = load_reference(cls, config, state)
    assert isinstance(loaded, ReferenceMemoryAttention)
    return loaded


def test_list_and_stacked_experts_are_the_same_function() -> None:
    listed = random_state(
        "RxTDecoder", config := {**SMALL, **MOE, "use_vectorized_moe": False, "num_shared_experts": 0}
    )
    names = {"w1": "fc1.linear.weight", "b1": "fc1.linear.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
    stacked = {key: value for key, value in listed.items() if ".experts." not in key}
    for layer in range(2):
        for short, long in names.items():
            parts = [listed[f"model.layers.{layer}.ff.experts.{e}.{long}"] for e in range(3)]
            stacked[f"model.layers.{layer}.ff.{short}"] = torch.stack(
                [part.mT for part in parts] if "w" in short else parts
            )
    first = decoder(config, listed)
    second = decoder({**config, "use_vectorized_moe": True, "moe_bias_mode": "local"}, stacked)
    assert torch.equal(first.forward_padded(IDS), second.forward_padded(IDS))


def test_query_heads_left_open_follow_the_stored_projection() -> None:
    config = {**SMALL, "att_query_groups": 1, "cross_att_query_groups": 4}
    state = random_state("RxTDecoder", config)
    loaded = decoder({**SMALL, "att_query_groups": None}, state)
    assert loaded.module.layers[0].attention.query_heads == 1
    assert loaded.module.layers[0].cross_attention.query_heads == 4
    state = random_state("RxTSelfInterlayerMemoryAttention", SELF_INTERLAYER)
    open_config = {**SELF_INTERLAYER, "interlayer_att_query_groups": None}
    network = memory("RxTSelfInterlayerMemoryAttention", open_config, state)
    assert network.module.interlayer_attention.q.weight.shape == (2, 16, 16)


@pytest.mark.parametrize("stored", [False, True])
def test_a_gate_of_the_cross_attention_that_is_denied_but_may_be_stored(stored: bool) -> None:
    state = random_state(
        "RxTDecoder", {**SMALL, "use_gated_attention": True, "use_gated_cross_attention": stored}
    )
    config = {**SMALL, "use_gated_attention": True, "use_gated_cross_attention": False}
    loaded = decoder(config, state)
    assert (loaded.module.layers[0].cross_attention.gate is not None) == stored


def test_norm_of_the_memory_follows_the_tensors_or_the_configuration() -> None:
    state = random_state("RxTDecoder", SMALL)
    older = {key: value for key, value in state.items() if "stm_norm" not in key}
    assert decoder(SMALL, older).module.layers[0].stm_norm is None
    assert decoder({**SMALL, "stm_norm": False}, older).module.layers[0].stm_norm is None
    assert decoder({**SMALL, "stm_norm": True}, state).module.layers[0].stm_norm is not None
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.stm_norm\.weight: found a tensor of shape \(16,\)"
    ):
        load_reference("RxTDecoder", {**SMALL, "stm_norm": False}, state)
    with pytest.raises(CheckpointError, match=r"layers\.0\.stm_norm\.weight: missing"):
        load_reference("RxTDecoder", {**SMALL, "stm_norm": True}, older)


@pytest.mark.parametrize("cls", ["RxTDecoder", "RxTSimpleMemoryAttention"])
def test_stored_memories(cls: str) -> None:
    config = SMALL if cls == "RxTDecoder" else MEMORY
    state = random_state(cls, config)
    stored = torch.randn(2, 6, 16)
    for shape in ((2, 6, 16), (2, 1, 6, 16)):
        loaded = load_reference(cls, config, {**state, STM_KEY: stored.view(shape)})
        assert isinstance(loaded, ReferenceDecoder | ReferenceMemoryAttention)
        assert torch.equal(loaded.stored_stm, stored[:, None])
        arguments = (IDS,) if isinstance(loaded, ReferenceDecoder) else (torch.randn(2, 2, 5, 16),)
        assert torch.equal(
            loaded.forward_padded(*arguments), loaded.forward_padded(*arguments, stm=stored.expand(2, 6, 16))
        )
        assert export_reference(loaded)[1][STM_KEY].shape == shape
    for wrong, expected in (
        ((2, 1, 8, 16), (2, 1, 6, 16)),
        ((2, 8, 16), (2, 6, 16)),
        ((3, 4, 6, 16), (2, 4, 6, 16)),
        ((2, 1, 6, 8), (2, 1, 6, 16)),
        ((16,), (2, 6, 16)),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_reference(cls, config, {**state, STM_KEY: torch.zeros(wrong)})
        assert f"{STM_KEY}: found shape {wrong}; expected {expected}" in str(caught.value)


def test_a_component_without_any_memory() -> None:
    state = random_state("RxTDecoder", SMALL)
    del state[STM_KEY]
    loaded = decoder(SMALL, state)
    assert loaded.stored_stm is None
    with pytest.raises(CheckpointError, match=r"model\.stm\.memory: missing"):
        loaded.forward_padded(IDS)


@pytest.mark.parametrize("shape", [(2, 3, 6, 16), (3, 2, 6, 16), (2, 6, 8), (2, 16), (1, 2, 2, 6, 16)])
def test_memories_that_do_not_fit_the_batch(shape: tuple[int, ...]) -> None:
    loaded = decoder(SMALL, random_state("RxTDecoder", SMALL))
    with pytest.raises(ValueError, match=r"stm: found shape .*; expected \(2, 2 or 1, slots, 16\)"):
        loaded.forward_padded(IDS, stm=torch.zeros(shape))


def test_slots_are_free_without_a_parameter_for_each() -> None:
    config = {**SELF_INTERLAYER, "use_gated_residual": True, "residual_per_slot_gate": False}
    cls = "RxTSelfInterlayerMemoryAttention"
    state = random_state(cls, config)
    encoded, stm = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 9, 16)
    after = memory(cls, config, state).forward_padded(encoded, None, stm)
    expected = naive.MemoryAttention(cls, config, state, training=False)(encoded, None, stm)
    assert_close(after, expected, "9 slots instead of 6")
    fixed = {**config, **LINEAR_GATE, "residual_per_slot_gate": True}
    loaded = memory(cls, fixed, random_state(cls, fixed))
    with pytest.raises(ValueError, match=r"stm: found shape \(2, 3, 9, 16\); expected \(2, 3, 6, 16\)"):
        loaded.forward_padded(encoded, None, stm)


def test_a_gate_of_other_slots_is_refused() -> None:
    config = {**MEMORY, **LINEAR_GATE}
    state = random_state("RxTSimpleMemoryAttention", config)
    del state[STM_KEY]
    with pytest.raises(
        CheckpointError, match=r"gate_layers\.0\.gate\.weight: found shape \(6, 6\); expected \(7, 7\)"
    ):
        load_reference("RxTSimpleMemoryAttention", {**config, "stm_size": 7}, state)


def test_single_numbers_may_be_stored_in_any_shape() -> None:
    config = {**SELF_INTERLAYER, "norm_type": "adaptive"}
    state = random_state("RxTSelfInterlayerMemoryAttention", config)
    for key in state:
        if key.endswith(("ema_rms", "norm_layers.0.gate")):
            state[key] = torch.tensor(0.5)
    loaded = memory("RxTSelfInterlayerMemoryAttention", config, state)
    assert loaded.module.norm.gate[0].item() == 0.5
    assert (loaded.module.mean_norm.ema_rms == 0.5).all()
    assert export_reference(loaded)[1]["model.mean_stm_norm.ema_rms"].shape == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bit_by_bit(dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in random_state("RxTDecoder", SMALL).items()}
    loaded = decoder(SMALL, state)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.module.parameters())
    exported = export_reference(loaded)[1]
    assert all(torch.equal(exported[key], state[key]) and exported[key].dtype == dtype for key in state)


def test_rounded_angles() -> None:
    """bf16 has 8 significant bits: at position 300 an angle is off by up to one."""
    state = random_state("RxTDecoder", SMALL)
    exact, rounded = (
        decoder({**SMALL, "rope_angle_dtype": kind}, state) for kind in ("float32", "activation")
    )
    assert torch.equal(exact.forward_padded(IDS), rounded.forward_padded(IDS))
    half = [model.bfloat16().forward_padded(IDS) for model in (exact, rounded)]
    assert not torch.equal(*half)
    positions = torch.arange(1024)
    rotation = rounded.module.rope.rotation(positions, 4, torch.bfloat16)
    angle = (positions.float()[:, None] * torch.tensor([1.0, 0.01])).bfloat16()
    assert torch.equal(rotation.cos[:, 0], angle.cos())
    assert torch.equal(rotation.sin[:, 0], angle.sin())
    heads = torch.randn(1024, 4, 4).bfloat16()
    error = (
        rotation.apply(heads).float()
        - exact.module.rope.rotation(positions, 4, torch.bfloat16).apply(heads).float()
    )
    assert error[:64].norm() < 0.02 * heads[:64].float().norm()
    assert error[256:].norm() > 0.2 * heads[256:].float().norm()


def test_encoders_that_read_a_memory() -> None:
    config = {**SMALL, "reads_memory": True}
    state = random_state("RxTEncoder", config)
    loaded = load_reference("RxTEncoder", config, state)
    ignoring = load_reference("RxTEncoder", SMALL, state)
    assert isinstance(loaded, ReferenceEncoder)
    assert isinstance(ignoring, ReferenceEncoder)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    reading = naive.encoder(config, state, IDS, mask, state[STM_KEY])
    real = mask.bool()
    for layers in (
        loaded.forward_padded(IDS, mask)[1],
        loaded.forward_padded(IDS, mask, stm=state[STM_KEY])[1],
        ignoring.forward_padded(IDS, mask, stm=state[STM_KEY][:, 0])[1],
    ):
        assert_close(layers[:, real], reading[:, real], "reads the memory")
    plain = naive.encoder(config, state, IDS, mask)
    assert_close(ignoring.forward_padded(IDS, mask)[1][:, real], plain[:, real], "reads none")
    del state[STM_KEY]
    with pytest.raises(CheckpointError, match=r"model\.stm\.memory: missing"):
        load_reference("RxTEncoder", config, state).forward_padded(IDS)
    skipping = {**SMALL, "skip_memory_cross_attention": True}
    without = load_reference("RxTEncoder", skipping, random_state("RxTEncoder", skipping))
    with pytest.raises(CheckpointError, match="skip_memory_cross_attention is True"):
        without.forward_padded(IDS, stm=torch.zeros(2, 6, 16))
    with pytest.raises(CheckpointError, match=r"not possible: reads_memory: has no effect"):
        load_reference("RxTEncoder", {**skipping, "reads_memory": True}, state)


def test_classes_of_the_first_generation() -> None:
    """Halves, memory slots up to the token's position, and an encoder that reads its stored memory."""
    config = {**SMALL, "stm_norm": False}
    as_then = {**config, "rope_layout": "halves", "causal_cross": True}
    state = random_state("RxTDecoder", config)
    loaded = decoder(config, state, "rxnn.transformers.RxTAlphaDecoder")
    assert loaded.cls == "RxTAlphaDecoder"
    expected, _ = naive.decoder(as_then, state, IDS, None, state[STM_KEY])
    assert_close(loaded.forward_padded(IDS), expected, "decoder")
    explicit = decoder(
        {**config, "rope_layout": "interleaved", "causal_cross": False}, state, "RxTAlphaDecoder"
    )
    expected, _ = naive.decoder(config, state, IDS, None, state[STM_KEY])
    assert_close(explicit.forward_padded(IDS), expected, "what the configuration says comes first")

    state = random_state("RxTEncoder", config)
    encoder = load_reference("RxTAlphaEncoder", config, state)
    assert isinstance(encoder, ReferenceEncoder)
    expected = naive.encoder(as_then, state, IDS, None, state[STM_KEY])
    assert_close(encoder.forward_padded(IDS)[1], expected, "encoder")

    state = random_state("RxTSimpleMemoryAttention", {**MEMORY, "norm_type": "rms"})
    state = {key: value for key, value in state.items() if "input_norm" not in key}
    network = memory("RxTAlphaMemoryAttention", MEMORY, state)
    encoded, stm = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 6, 16)
    as_then = {**MEMORY, "norm_type": "rms", "rope_layout": "halves"}
    expected = naive.MemoryAttention("RxTSimpleMemoryAttention", as_then, state, training=False)(
        encoded, None, stm
    )
    assert_close(network.forward_padded(encoded, None, stm), expected, "memory attention")


def test_unknown_keys_are_tolerated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    known = {
        "use_flash_attention": True,
        "moe_grouped_gemm": False,
        "rope_layout": "halves",
        "legacy_causal_cross": True,
        "causal_cross": True,
        "rope_angle_dtype": "float32",
        "stm_norm": True,
        "gated_attention_activation": "sigmoid",
    }
    with caplog.at_level(logging.WARNING):
        load_reference("RxTDecoder", {**SMALL, **known}, random_state("RxTDecoder", SMALL))
        encoder = {**SMALL, "legacy_stm_in_encoder": True}
        load_reference("RxTEncoder", encoder, random_state("RxTEncoder", SMALL))
        complete = {**MEMORY, "debug_mode": False, "att_experts": None, "att_dropout": 0.0}
        load_reference("RxTSimpleMemoryAttention", complete, random_state("RxTSimpleMemoryAttention", MEMORY))
        assert not caplog.records
        load_reference("RxTDecoder", {**SMALL, "use_telepathy": True}, random_state("RxTDecoder", SMALL))
    assert "RxTDecoder: ignoring unknown configuration keys: use_telepathy" in caplog.text
    state = random_state("RxTSelfInterlayerMemoryAttention", SELF_INTERLAYER)
    with caplog.at_level(logging.WARNING):
        load_reference("RxTSelfInterlayerMemoryAttention", {**SELF_INTERLAYER, "num_groups": 2}, state)
    assert "num_groups" in caplog.text


@pytest.mark.parametrize(
    ("cls", "key", "replacement", "message"),
    [
        ("RxTDecoder", "model.head.bias", None, r"missing from the checkpoint; .*shape \(11,\)"),
        ("RxTDecoder", "model.head.bias", (12,), r"found shape \(12,\); expected \(11,\)"),
        ("RxTDecoder", "model.embedding.weight", (12, 16), r"found shape \(12, 16\); expected \(11, 16\)"),
        (
            "RxTDecoder",
            "model.layers.0.attention.k_proj.weight",
            (4, 16),
            r"found shape \(4, 16\); expected \(8, 16\)",
        ),
        ("RxTDecoder", "model.extra", (2,), r"found a tensor of shape \(2,\); expected no tensor"),
        ("RxTDecoder", "model.layers.2.norm1.weight", (16,), r"found a tensor of shape \(16,\); expected no"),
        ("RxTEncoder", "model.layers.1.norm3.weight", None, r"missing from the checkpoint; .*shape \(16,\)"),
        ("RxTEncoder", "model.embedding.weight", (9, 16), r"found shape \(9, 16\); expected \(11, 16\)"),
        ("MLMHead", "decoder.weight", None, r"missing from the checkpoint; .*\(vocabulary, width\)"),
        ("MLMHead", "decoder.weight", (12, 16), r"found shape \(12, 16\); expected \(11, 16\)"),
        ("MLMHead", "dense.weight", (16, 15), r"found shape \(16, 15\); expected \(16, 16\)"),
        ("RxTSelfInterlayerMemoryAttention", "model.mean_stm_norm.weight", None, r"missing .*shape \(16,\)"),
        ("RxTSelfInterlayerMemoryAttention", "model.attention_layers.1.k_proj.weight", (4, 16), r"\(4, 16\)"),
        (
            "RxTSelfInterlayerMemoryAttention",
            "model.self_attention_layers.0.q_proj.weight",
            (8, 16),
            "expected no",
        ),
    ],
)
def test_wrong_tensors(cls: str, key: str, replacement: tuple[int, ...] | None, message: str) -> None:
    config = {
        "MLMHead": {"embed_dim": 16, "vocab_size": 11},
        "RxTSelfInterlayerMemoryAttention": SELF_INTERLAYER,
    }.get(cls, SMALL)
    state = random_state(cls, config)
    state.pop(key, None)
    if replacement is not None:
        state[key] = torch.zeros(replacement)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_reference(cls, config, state)
    assert str(caught.value).startswith(f"{key}: ")


def test_tensors_of_whole_numbers_are_refused() -> None:
    state = random_state("RxTDecoder", SMALL)
    state["model.head.bias"] = state["model.head.bias"].to(torch.int32)
    with pytest.raises(CheckpointError, match=r"model\.head\.bias: found int32 numbers"):
        load_reference("RxTDecoder", SMALL, state)


SELF_CLASS = "RxTSelfMemoryAttention"
SIMPLE = "RxTSimpleMemoryAttention"


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        ("RxTDecoder", {"self_att_type": "flex"}, "self_att_type is 'flex'; valid: mha, gqa, mqa, sqa"),
        ("RxTDecoder", {"ff_activation": "tanh"}, "ff_activation is 'tanh'; valid: swish"),
        ("RxTDecoder", {"att_groups": 3}, "not possible: att_groups: found 3; .*valid: 1, 2, 4$"),
        ("RxTDecoder", {"att_query_groups": 5}, "not possible: att_query_groups: found 5; .*valid: 1, 2, 4"),
        ("RxTDecoder", {"att_heads": 5}, "not possible: att_heads: found 5; .*valid: 1, 2, 4, 8$"),
        ("RxTDecoder", {"num_layers": "two"}, "num_layers is 'two'; valid: a whole number of at least 1"),
        ("RxTDecoder", {"num_layers": 0}, "num_layers is 0; valid: a whole number of at least 1"),
        ("RxTDecoder", {"use_gated": "yes"}, "use_gated is 'yes'; valid: True, False"),
        ("RxTDecoder", {"att_query_groups": 1.5}, "att_query_groups is 1.5; valid: a whole number"),
        ("RxTDecoder", {"rope_base": "big"}, "rope_base is 'big'; valid: a number"),
        ("RxTDecoder", {"rope_layout": "quarters"}, "rope_layout is 'quarters'; valid: interleaved, halves"),
        (
            "RxTDecoder",
            {"rope_angle_dtype": "bf16"},
            "rope_angle_dtype is 'bf16'; valid: float32, activation",
        ),
        (
            "RxTDecoder",
            {"causal_cross": True, "legacy_causal_cross": False},
            "causal_cross is True and legacy_causal_cross is False; valid: one of them",
        ),
        (
            "RxTDecoder",
            {"use_gated_attention": True, "gated_attention_activation": "tanh"},
            "gated_attention_activation is 'tanh'; valid: sigmoid",
        ),
        (
            "RxTDecoder",
            {**MOE, "moe_bias_mode": "some"},
            "moe_bias_mode is 'some'; valid: local, global, off",
        ),
        ("RxTDecoder", {**MOE, "moe_top_k": 4}, "not possible: moe_top_k: found 4; .*valid: 1 to 3"),
        (
            "RxTDecoder",
            {"stateless_layers_config": ["sparse"]},
            r"stateless_layers_config is \['sparse'\]; valid: None, or a list of dense, moe",
        ),
        (
            "RxTDecoder",
            {"stateless_layers_config": ["moe"]},
            "not possible: stateless_layers_config: has `moe`",
        ),
        ("RxTEncoder", {"reads_memory": "no"}, "reads_memory is 'no'; valid: True, False"),
        (SIMPLE, {"norm_type": "batch"}, "norm_type is 'batch'; valid: classic-rms, rms"),
        (
            SIMPLE,
            {"use_gated_residual": True, "residual_gate_type": "soft"},
            "residual_gate_type is 'soft'; valid: static",
        ),
        (SIMPLE, {"att_type": "flex"}, "att_type is 'flex'; valid: mha"),
        (SIMPLE, {"norm_decay": 1.5}, "not possible: norm_decay: found 1.5"),
        (SIMPLE, {"disable_residual": True, "use_gated_residual": True}, "not possible: use_gated_residual"),
        (SELF_CLASS, {"self_att_groups": 3}, "not possible: self_att_groups: found 3; .*valid: 1, 2, 4"),
        ("RxTGroupedSelfInterlayerMemoryAttention", {"num_groups": 3}, "not possible: num_groups: found 3"),
        ("MLMHead", {"embed_dim": "wide"}, "embed_dim is 'wide'; valid: a whole number"),
    ],
)
def test_impossible_configurations(cls: str, change: dict[str, Any], message: str) -> None:
    config = {
        "MLMHead": {"embed_dim": 16, "vocab_size": 11},
        SIMPLE: MEMORY,
        SELF_CLASS: {**MEMORY, "self_att_query_groups": 1},
        "RxTGroupedSelfInterlayerMemoryAttention": SELF_INTERLAYER,
    }.get(cls, SMALL)
    state = random_state(cls, config)
    with pytest.raises(CheckpointError, match=f"^config: .*{message}"):
        load_reference(cls, {**config, **change}, state)


def test_unknown_class() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.Perceptron' cannot be loaded; valid: .*RxTDecoder"):
        load_reference("a.Perceptron", {}, {})
