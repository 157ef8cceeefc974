"""The packaged model files have the published sizes."""

from __future__ import annotations

import pytest

from rxt_dist.config import AttentionConfig, GateConfig, ModelConfig, available, load_model_config


def attention_parameters(attention: AttentionConfig, heads: int, dim: int) -> int:
    width, out = dim // heads, max(attention.query_heads, attention.kv_heads)
    projections = (attention.query_heads + 2 * attention.kv_heads + out) * width * dim
    return projections + (dim if attention.output_bias else 0)


def feed_forward_parameters(dim: int, hidden: int) -> int:
    return dim * 2 * hidden + 2 * hidden + hidden * dim + dim


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
    layer = attention_parameters(decoder.attention, decoder.heads, dim)
    layer += attention_parameters(decoder.cross_attention, decoder.heads, dim)
    layer += decoder.moe.num_experts * (dim + feed_forward_parameters(dim, decoder.ff_dim))
    layer += (4 if decoder.stm_norm else 3) * dim
    return vocab * dim + decoder.num_layers * layer + dim * vocab + vocab


def gate_parameters(gate: GateConfig, slots: int) -> int:
    assert gate.type == "linear"
    assert gate.per_slot
    return slots * slots + slots


def memory_attention_parameters(model: ModelConfig) -> int:
    memory, dim = model.memory_attention, model.embed_dim
    assert memory.variant == "self_interlayer"
    assert memory.interlayer_attention is not None
    layer = attention_parameters(memory.attention, memory.heads, dim)
    layer += attention_parameters(memory.interlayer_attention, memory.heads, dim)
    layer += 3 * dim + 3 * gate_parameters(memory.gate, model.stm_size)
    return model.decoder.num_layers * layer + dim  # one norm of the mean over layers, shared by all


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("micro", 1_878_016, 8_766_088),
        ("mini", 9_138_176, 57_765_648),
        ("alpha", 13_801_472, 141_379_104),
    ],
)
def test_published_parameter_counts(name: str, encoder: int, decoder: int) -> None:
    model = load_model_config(name)
    assert model.card_vocab_size is not None
    assert encoder_parameters(model, model.card_vocab_size) == encoder
    assert decoder_parameters(model, model.card_vocab_size) == decoder


def test_alpha_memory_attention_and_total() -> None:
    model = load_model_config("alpha")
    memory = memory_attention_parameters(model)
    assert memory == 5_529_856
    shared_embedding = 20_000 * 256
    assert 13_801_472 + 141_379_104 + memory - shared_embedding == 155_590_432


def test_model_files_leave_the_vocabulary_to_the_dataset() -> None:
    assert available("models") == ["alpha", "micro", "mini", "tiny"]
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
