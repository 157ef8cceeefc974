"""Switches for the mathematics of older published models, in the flat layout that training uses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_samples import SYMMETRIC, model_config, perturb, random_tokens
from pydantic import ValidationError

from rxt_dist.config import load_config
from rxt_dist.errors import ConfigError
from rxt_dist.kernels.attention import attention
from rxt_dist.model import Decoder, Encoder, Memory, SequenceLayout
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.rope import RopeSettings, Rotation

CAUSAL: dict[str, Any] = {"causal_cross": True, "moe": None}


def decoder(seed: int = 0, **fields: Any) -> Decoder:
    built = Decoder(model_config(decoder={**CAUSAL, **fields}))
    initialise(built, seed)
    perturb(built)
    return built


@pytest.mark.parametrize("slots", [1, 4, 9])
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_token_reads_the_slots_up_to_its_position(lanes: int, slots: int) -> None:
    """Sequences of unequal lengths, one of them empty, shorter and longer than the memory."""
    lengths = [6, 1, 0, 9]
    layout = SequenceLayout.from_lengths(lengths)
    stm = torch.randn(1, lanes, slots, 8)
    memory = Memory.of_stm(stm, layout)
    groups = memory.up_to_position(layout)
    assert groups is memory.up_to_position(layout)
    q, k, v = torch.randn(16, 2, 8), torch.randn(lanes * slots, 2, 8), torch.randn(lanes * slots, 2, 8)
    out = attention(q, k, v, groups, causal=True)
    for row in range(16):
        sequence, position = int(layout.sequence_ids[row]), int(layout.positions[row])
        first = sequence * slots if lanes > 1 else 0
        seen = slice(first, first + min(position + 1, slots))
        for head in range(2):
            weights = (k[seen, head] @ q[row, head] / math.sqrt(8)).softmax(0)
            torch.testing.assert_close(out[row, head], weights @ v[seen, head])


@pytest.mark.parametrize("slots", [3, 8])
def test_later_slots_and_later_rows_reach_no_earlier_token(slots: int) -> None:
    model = decoder()
    layout = SequenceLayout.from_lengths([5, 7])
    tokens = random_tokens([5, 7])
    stm = torch.randn(2, 2, slots, 32, requires_grad=True)
    model(tokens, layout, Memory.of_stm(stm, layout)).hidden[5 + 1].sum().backward()
    reached = stm.grad.abs().sum(dim=(0, 3)) > 0
    assert reached.tolist() == [[False] * slots, [True] * 2 + [False] * (slots - 2)]

    layers = torch.randn(2, 12, 32, requires_grad=True)
    model(tokens, layout, Memory.of_sequence(layers, layout)).hidden[5 + 1].sum().backward()
    reached = layers.grad.abs().sum(dim=(0, 2)) > 0
    assert reached.nonzero()[:, 0].tolist() == [5, 6]


@pytest.mark.parametrize("slots", [3, 8])
def test_generating_with_a_cache_reads_the_same_slots(slots: int) -> None:
    model = decoder().eval()
    lengths = [4, 6]
    stm = torch.randn(2, 2, slots, 32)
    tokens = random_tokens(lengths)
    layout = SequenceLayout.from_lengths(lengths)
    with torch.no_grad():
        whole = model(tokens, layout, Memory.of_stm(stm, layout)).hidden
        cache = model.new_cache(2)
        first = torch.cat((tokens[:2], tokens[4:8]))
        outputs = []
        for part, added in ((first, [2, 4]), (tokens[[2, 8]], [1, 1]), (tokens[[3, 9]], [1, 1])):
            fresh = SequenceLayout.from_lengths(added)
            begun = cache.begin(fresh, added)
            outputs.append(model(part, begun, Memory.of_stm(stm, fresh), cache).hidden)
    torch.testing.assert_close(outputs[0], torch.cat((whole[:2], whole[4:8])))
    torch.testing.assert_close(outputs[1], whole[[2, 8]])
    torch.testing.assert_close(outputs[2], whole[[3, 9]])


def test_halves_are_the_same_pairs_in_another_order() -> None:
    x = torch.randn(5, 3, 8)
    positions = torch.arange(5)
    adjacent = Rotation.at(positions, 8, 100.0).apply_one_sided(x)
    halves = Rotation.at(positions, 8, 100.0, layout="halves").apply_one_sided(x)
    assert torch.equal(halves, torch.cat((adjacent[..., 0::2], adjacent[..., 1::2]), dim=-1))
    both = Rotation.at(positions, 8, 100.0, layout="halves").apply(x)
    assert torch.equal(both, adjacent)


def test_angles_are_rounded_to_narrower_activations_alone() -> None:
    rope = RopeSettings.of(model_config(rope_angle_dtype="activation"))
    positions = torch.arange(300)
    assert rope.rotation(positions, 8, torch.bfloat16).cos.dtype == torch.bfloat16
    for wide in (torch.float32, torch.float64):
        assert rope.rotation(positions, 8, wide).cos.dtype == torch.float32


def test_an_encoder_reads_the_memory_it_is_given() -> None:
    part = {"memory_cross_attention": SYMMETRIC, "stm_norm": True, "reads_memory": True}
    encoder = Encoder(model_config(encoder=part))
    initialise(encoder, seed=0)
    tokens, layout = random_tokens([3, 4]), SequenceLayout.from_lengths([3, 4])
    first, second = torch.randn(2, 2, 5, 32), torch.randn(2, 2, 5, 32)
    second[:, 0] = first[:, 0]
    read = [encoder(tokens, layout, Memory.of_stm(stm, layout)) for stm in (first, second)]
    assert torch.equal(read[0][:, :3], read[1][:, :3])
    assert not torch.allclose(read[0][:, 3:], read[1][:, 3:])
    assert not torch.allclose(encoder(tokens, layout), read[0])
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert not any("cross" in name or "stm_norm" in name for name in trained)


def test_encoders_that_read_a_memory_are_not_trained() -> None:
    changes = [
        "model.encoder.reads_memory=true",
        "model.encoder.memory_cross_attention={query_heads: 2, kv_heads: 2}",
    ]
    with pytest.raises(ConfigError, match=r"model\.encoder\.reads_memory: found true; .* not trained"):
        load_config("tiny", changes)


@pytest.mark.parametrize("field", ["stm_norm", "reads_memory"])
def test_switches_of_a_cross_attention_that_is_not_there(field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field}: has no effect without memory_cross_attention"):
        model_config(encoder={field: True})


def test_several_memories_need_as_many_sequences() -> None:
    layout = SequenceLayout.from_lengths([2, 2])
    with pytest.raises(ValueError, match="stm: found 3 lanes; expected 1 or 2"):
        Memory.of_stm(torch.zeros(2, 3, 4, 32), layout)


def test_an_ungated_residual_needs_another_gate() -> None:
    memory = {"heads": 4, "attention": SYMMETRIC, "variant": "self", "gate_residual": False}
    for fields in ({}, {"gate_self_attention": True, "gate": {"type": "off"}}):
        with pytest.raises(ValidationError, match="gate_residual: found false, but nothing else is gated"):
            model_config(memory_attention={**memory, **fields})
    model_config(memory_attention={**memory, "gate_self_attention": True})
