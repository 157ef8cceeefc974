"""Sizes of the published models, to the parameter."""

from __future__ import annotations

import pytest
from model_samples import SYMMETRIC, VARIANTS, VOCAB, model_config

from rxt_dist.config import ModelConfig, load_model_config
from rxt_dist.model import build_model, count_parameters


def card(name: str) -> dict[str, int]:
    config = load_model_config(name)
    assert config.card_vocab_size is not None
    return count_parameters(config, config.card_vocab_size)


def test_micro() -> None:
    counts = card("micro")
    assert counts["decoder"] == 8_766_088
    assert counts["encoder"] == 1_878_016


def test_mini() -> None:
    counts = card("mini")
    assert counts["encoder"] == 9_138_176
    assert counts["mlm_head"] == 2_636_304


def test_alpha() -> None:
    counts = card("alpha")
    assert counts["decoder"] == 141_379_104
    assert counts["decoder_active"] == 34_842_144
    assert counts["encoder"] == 13_801_472
    assert counts["memory_attention"] == 5_529_856
    assert counts["total"] == 160_710_432
    assert counts["unique"] == 155_590_432


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_those_of_the_built_model(name: str) -> None:
    config: ModelConfig = VARIANTS[name]
    counts, model = count_parameters(config, VOCAB), build_model(config, seed=0)
    parts = {key: sum(p.numel() for p in child.parameters()) for key, child in model.named_children()}
    assert {key: counts[key] for key in parts} == parts
    final = sum(size for key, size in parts.items() if key != "mlm_head")
    assert counts["total"] == final
    assert counts["unique"] == final - VOCAB * config.embed_dim
    assert counts["unique"] + parts["mlm_head"] == sum(p.numel() for p in model.parameters())


def test_active_leaves_out_unvisited_experts() -> None:
    all_visited = model_config(decoder={"moe": {"num_experts": 4, "top_k": 4}})
    one_visited = model_config(decoder={"moe": {"num_experts": 4, "top_k": 1}})
    full, sparse = count_parameters(all_visited, VOCAB), count_parameters(one_visited, VOCAB)
    assert full["active"] == full["unique"] == sparse["unique"]
    expert = 2 * 24 * 32 + 2 * 24 + 32 * 24 + 32
    assert full["active"] - sparse["active"] == 2 * 3 * expert
    assert full["decoder_active"] - sparse["decoder_active"] == 2 * 3 * expert


def test_vocabulary_is_an_argument() -> None:
    config = model_config(vocab_size="auto", encoder={"memory_cross_attention": SYMMETRIC})
    small, large = count_parameters(config, 10), count_parameters(config, 11)
    assert large["unique"] - small["unique"] == 32 + 33  # an embedding row, an LM head row and its bias
    assert large["mlm_head"] - small["mlm_head"] == 33
