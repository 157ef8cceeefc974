"""The packaged model files have the published sizes."""

from __future__ import annotations

import pytest

from rxt_dist.config import (
    AttentionConfig,
    GateConfig,
    ModelConfig,
    MoEConfig,
    available,
    load_model_config,
)
from rxt_dist.model import count_parameters


def attention_parameters(attention: AttentionConfig, heads: int, dim: int) -> int:
    width, out = dim // heads, max(attention.query_heads, attention.kv_heads)
    gate = out if attention.gated else 0
    projections = (attention.query_heads + 2 * attention.kv_heads + out + gate) * width * dim
    return projections + (dim if attention.output_bias else 0)


def feed_forward_parameters(dim: int, hidden: int, *, biased: bool = True) -> int:
    weights = dim * 2 * hidden + hidden * dim
    return weights + (2 * hidden + dim if biased else 0)


def experts_parameters(moe: MoEConfig, dim: int, hidden: int) -> int:
    """Router, routed experts, and shared ones with their softmax gate."""
    found = moe.num_experts * (dim + feed_forward_parameters(dim, hidden, biased=moe.bias == "local"))
    found += dim if moe.bias == "global" else 0
    if moe.num_shared_experts == 0:
        return found
    assert moe.num_shared_experts > 1
    assert moe.shared_bias == "global"
    assert moe.shared_expert_dim is not None
    one = dim + feed_forward_parameters(dim, moe.shared_expert_dim, biased=False)
    return found + moe.num_shared_experts * one + dim


def encoder_parameters(model: ModelConfig, vocab: int) -> int:
    encoder, dim = model.encoder, model.embed_dim
    layer = attention_parameters(encoder.attention, encoder.heads, dim)
    layer += feed_forward_parameters(dim, encoder.ff_dim) + 2 * dim
    if encoder.memory_cross_attention is not None:
        layer += attention_parameters(encoder.memory_cross_attention, encoder.heads, dim) + dim
    return vocab * dim + encoder.num_layers * layer


def decoder_parameters(model: ModelConfig, vocab: int) -> int:
    decoder, dim = model.decoder, model.embed_dim
    assert decoder.moe is not None
    attention = attention_parameters(decoder.attention, decoder.heads, dim)
    forward = {
        "moe": experts_parameters(decoder.moe, dim, decoder.ff_dim),
        "dense": feed_forward_parameters(dim, decoder.dense_layer_dim),
    }
    layer = attention + attention_parameters(decoder.cross_attention, decoder.heads, dim) + forward["moe"]
    layer += (4 if decoder.stm_norm else 3) * dim
    stateless = [*decoder.stateless_layers, *decoder.final_stateless_layers]
    others = sum(attention + forward[kind] + 2 * dim for kind in stateless)
    head = dim * vocab + vocab + (0 if decoder.head_norm == "none" else dim)
    return vocab * dim + decoder.num_layers * layer + others + head


def mlm_head_parameters(dim: int, vocab: int) -> int:
    return dim * dim + dim + 2 * dim + vocab * dim + vocab


def gate_parameters(gate: GateConfig, slots: int) -> int:
    assert gate.per_slot
    return {"linear": slots * slots + slots, "elementwise": slots}[gate.type]


def memory_attention_parameters(model: ModelConfig) -> int:
    memory, dim = model.memory_attention, model.embed_dim
    assert memory.variant in ("self_interlayer", "grouped_self_interlayer")
    assert memory.interlayer_attention is not None
    layer = attention_parameters(memory.attention, memory.heads, dim)
    layer += attention_parameters(memory.interlayer_attention, memory.heads, dim)
    layer += 3 * dim + 3 * gate_parameters(memory.gate, model.stm_size)
    return model.decoder.num_layers * layer + dim  # one norm of the mean over layers, shared by all


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("micro", 1_878_016, 8_766_088),
        ("micro-plus", 2_775_040, 22_403_660),
        ("mini", 9_138_176, 57_765_648),
        ("alpha", 13_801_472, 141_379_104),
        ("beta", 96_958_976, 2_841_937_920),
    ],
)
def test_parameters_of_encoder_and_decoder(name: str, encoder: int, decoder: int) -> None:
    model = load_model_config(name)
    assert model.card_vocab_size is not None
    assert encoder_parameters(model, model.card_vocab_size) == encoder
    assert decoder_parameters(model, model.card_vocab_size) == decoder
    counts = count_parameters(model, model.card_vocab_size)
    assert (counts["encoder"], counts["decoder"]) == (encoder, decoder)


@pytest.mark.parametrize("name", ["micro-plus", "alpha", "beta"])
def test_parameters_of_memory_attention_and_mlm_head(name: str) -> None:
    model = load_model_config(name)
    assert model.card_vocab_size is not None
    counts = count_parameters(model, model.card_vocab_size)
    assert memory_attention_parameters(model) == counts["memory_attention"]
    assert mlm_head_parameters(model.embed_dim, model.card_vocab_size) == counts["mlm_head"]


def test_alpha_memory_attention_and_total() -> None:
    model = load_model_config("alpha")
    memory = memory_attention_parameters(model)
    assert memory == 5_529_856
    shared_embedding = 20_000 * 256
    assert 13_801_472 + 141_379_104 + memory - shared_embedding == 155_590_432


def test_beta_has_the_published_sizes() -> None:
    """2.85B (190M active), 97M and 33.8M as published; a token visits 10 of 384 experts."""
    model = load_model_config("beta")
    assert model.decoder.moe is not None
    counts = count_parameters(model, 65_536)
    assert counts["decoder"] == pytest.approx(2.85e9, rel=0.01)
    assert counts["decoder_active"] == pytest.approx(190e6, rel=0.03)
    assert counts["encoder"] == pytest.approx(97e6, rel=0.01)
    assert counts["mlm_head"] == pytest.approx(33.8e6, rel=0.01)
    expert = feed_forward_parameters(512, 192, biased=False)
    layers = 21 + 1 + 2
    assert counts["decoder"] - counts["decoder_active"] == layers * (384 - 10) * expert


def test_stored_numbers_of_micro_plus() -> None:
    """The published encoder file has 3.1 million numbers: parameters, STM, and rotary positions."""
    stm, rotary = 10 * 256 * 128, 256 * 8 + 8
    parameters = encoder_parameters(load_model_config("micro-plus"), 7500)
    assert parameters + stm + rotary == 3_104_776


def test_model_files_leave_the_vocabulary_to_the_dataset() -> None:
    assert {"alpha", "beta", "micro", "micro-plus", "mini", "tiny"} <= set(available("models"))
    for name in available("models"):
        model = load_model_config(name)
        assert model.vocab_size == "auto"
        assert model.special_tokens == "auto"


def test_tiny_can_be_split_over_two_ranks_and_four_expert_ranks() -> None:
    model = load_model_config("tiny")
    for attention in (model.encoder.attention, model.decoder.attention, model.decoder.cross_attention):
        assert attention.query_heads % 2 == 0
        assert attention.kv_heads % 2 == 0
    assert model.decoder.moe is not None
    assert model.decoder.moe.num_experts % 4 == 0
    assert model.decoder.moe.num_shared_experts == 1
