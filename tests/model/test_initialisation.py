"""Initial parameters: what they are, and that nothing but seed and name decides them."""

from __future__ import annotations

import math

import pytest
import torch
from model_samples import SYMMETRIC, model_config
from torch import nn

from rxt_dist.errors import ConfigError
from rxt_dist.model import Decoder, build_model
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import Experts
from rxt_dist.randomness import derive_key

CONFIG = model_config(
    embed_dim=64,
    encoder={"attention": {**SYMMETRIC, "gated": True}},
    decoder={"stateless_layers": ["dense"], "moe": {"num_experts": 4, "top_k": 2, "num_shared_experts": 2}},
)


def test_same_seed_same_parameters_whatever_the_global_generator_does() -> None:
    torch.manual_seed(0)
    first = build_model(CONFIG, seed=5).state_dict()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = build_model(CONFIG, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    third = build_model(CONFIG, seed=6)
    changed = {key for key, value in third.state_dict().items() if not torch.equal(value, first[key])}
    constant = {key for key in first if "norm" in key or "experts.b_" in key or "shared.b_" in key}
    assert changed == set(first) - constant


def test_a_component_built_alone_is_the_same() -> None:
    """Neither build order nor neighbours enter: only the canonical name does."""
    model = build_model(CONFIG, seed=5)
    holder = nn.Module()
    holder.decoder = Decoder(CONFIG)
    initialise(holder, seed=5)
    for key, parameter in holder.decoder.named_parameters():
        if key != "embedding.weight":  # in the whole model it is the encoder's
            assert torch.equal(parameter, dict(model.decoder.named_parameters())[key]), key


def test_a_rank_with_some_experts_draws_exactly_those() -> None:
    whole = Experts(4, 16, 8, gated=True, activation="silu", biased=True)
    initialise(whole, seed=2)
    part = Experts(2, 16, 8, gated=True, activation="silu", biased=True)
    part.first_expert = 2
    initialise(part, seed=2)
    assert torch.equal(part.w_in, whole.w_in[2:])
    assert torch.equal(part.w_out, whole.w_out[2:])
    assert not torch.equal(whole.w_in[0], whole.w_in[1])


def test_fused_projections_are_drawn_part_by_part() -> None:
    model = build_model(CONFIG, seed=5)
    fused = model.decoder.layers[1].attention.qkv.weight
    size = fused.shape[0] // 3
    key = derive_key(5, "init", "decoder.layers.1.attention.k.weight")
    bound = 1 / math.sqrt(64)
    expected = torch.empty(size, 64).uniform_(-bound, bound, generator=torch.Generator().manual_seed(key))
    assert torch.equal(fused[size : 2 * size], expected)


def assert_uniform(x: torch.Tensor, fan_in: int) -> None:
    bound = 1 / math.sqrt(fan_in)
    assert x.abs().max() <= bound
    assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def assert_normal(x: torch.Tensor, mean: float, std: float) -> None:
    error = std / math.sqrt(x.numel())
    assert abs(x.mean().item() - mean) < 4 * error
    assert x.std().item() == pytest.approx(std, rel=0.1)


def test_distributions() -> None:
    model = build_model(CONFIG, seed=0)
    decoder, layer = model.decoder, model.decoder.layers[0]
    assert_normal(model.encoder.embedding.weight, 0.0, 1.0)
    assert_uniform(layer.attention.qkv.weight, 64)
    assert_uniform(layer.cross_attention.kv.weight, 64)
    assert_uniform(layer.attention.out.weight, 32)
    assert_uniform(decoder.lm_head.weight, 64)
    assert_uniform(model.mlm_head.weight, 64)
    assert_uniform(model.mlm_head.dense.weight, 64)
    assert_uniform(layer.feed_forward.router.proj.weight, 64)
    dense = decoder.stateless_layers[0].feed_forward
    assert_uniform(dense.in_proj.weight, 64)
    assert_uniform(dense.out_proj.weight, dense.out_proj.in_features)
    assert dense.out_proj.bias.abs().max() <= 1 / math.sqrt(dense.out_proj.in_features)
    assert dense.in_proj.bias.any()
    assert_normal(model.encoder.layers[0].attention.gate.weight, 1.0, 0.01)
    experts = layer.feed_forward.experts
    for expert in (*experts.w_in, *experts.w_out, *layer.feed_forward.shared.w_in):
        assert_normal(expert, 0.0, 0.02)
    assert not experts.b_in.any()
    assert not experts.b_out.any()
    assert torch.equal(layer.attention_norm.weight, torch.ones(64))
    assert torch.equal(model.mlm_head.norm.weight, torch.ones(64))
    assert not model.mlm_head.norm.bias.any()


def test_a_parameter_nobody_speaks_for_is_an_error() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="no initial distribution for parameter weight"):
        initialise(module, seed=0)


def test_auto_vocabulary_must_be_resolved_first() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: found auto"):
        build_model(model_config(vocab_size="auto"), seed=0)


def test_experts_can_start_as_linear_layers_do() -> None:
    config = model_config(
        embed_dim=64,
        decoder={"moe": {"num_experts": 4, "top_k": 2, "num_shared_experts": 2, "expert_init": "linear"}},
    )
    moe = build_model(config, seed=0).decoder.layers[0].feed_forward
    for experts in (moe.experts, moe.shared):
        assert_uniform(experts.w_in, 64)
        assert_uniform(experts.w_out, 24)
        assert experts.b_in.any()
        assert experts.b_out.any()


def test_queries_and_keys_of_self_attention_start_smaller_when_asked() -> None:
    """The same draws, scaled: nothing else moves."""
    plain = build_model(CONFIG, seed=5)
    scaled = build_model(CONFIG.model_copy(update={"query_key_init_scale": 0.25}), seed=5)
    moved = dict(scaled.named_parameters())
    checked = 0
    for name, parameter in plain.named_parameters():
        if not name.endswith("attention.qkv.weight"):
            assert torch.equal(parameter, moved[name]), name
            continue
        attention = plain.get_submodule(name.removesuffix(".qkv.weight"))
        rows = (attention.query_heads + attention.kv_heads) * attention.head_width
        torch.testing.assert_close(moved[name][:rows], parameter[:rows] * 0.25, rtol=1e-6, atol=1e-8)
        assert torch.equal(moved[name][rows:], parameter[rows:])
        checked += 1
    assert checked == CONFIG.encoder.num_layers + CONFIG.decoder.num_layers + 1
