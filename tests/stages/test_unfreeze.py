"""Components that join later: whose gradients are dropped, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers.lanes import (
    Lanes,
    MemoryPieces,
    gradients,
    lane_config,
    lane_module,
    random_conversations,
    windows,
)

from rxt_dist.stages.base import NEVER

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
EMBEDDING = "encoder.embedding.weight"


def gradients_at(stage: str, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the fourth window of a stage that stands at ``step``."""
    config = lane_config(f"{{name: smat, steps: 9, {stage}}}")
    module = lane_module(config)
    lanes = Lanes(module, config)
    module.step = step
    with windows(MemoryPieces(random_conversations(COUNTS)), window=2) as steps:
        for _ in range(3):
            lanes.step(next(steps))
        loss, _ = lanes.step(next(steps))
    return loss.detach(), gradients(module, loss)


@pytest.mark.parametrize(
    ("unfreeze", "step", "frozen"),
    [
        ("memory_attention: 2, encoder: 4", 1, "encoder, memory_attention"),
        ("memory_attention: 2, encoder: 4", 2, "encoder"),
        ("memory_attention: 2, encoder: 4", 4, ""),
        ("memory_attention: 3", 0, "memory_attention"),
        ("decoder: 3", 2, "decoder"),
        ("decoder: 3, encoder: 2", 1, "encoder, decoder"),
        ("decoder: 3, memory_attention: 1", 0, "memory_attention, decoder"),
    ],
)
def test_until_its_step_a_component_gets_zeros_and_the_others_what_they_get_without_it(
    unfreeze: str, step: int, frozen: str
) -> None:
    loss, found = gradients_at(f"unfreeze: {{{unfreeze}}}", step)
    other_loss, expected = gradients_at(f"frozen: [{frozen}]", 0)
    assert torch.equal(loss, other_loss)
    assert expected.keys() <= found.keys()
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in found.items():
        if name in expected:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-8)
        else:
            assert not gradient.any(), name


def test_a_frozen_component_passes_gradients_on() -> None:
    """Encoder alone: its gradient comes through the frozen memory attention and the frozen decoder."""
    _, alone = gradients_at("frozen: [memory_attention, decoder]", 0)
    _, together = gradients_at("frozen: []", 0)
    assert {name.partition(".")[0] for name in alone} == {"encoder"}
    for name, gradient in alone.items():
        if name == EMBEDDING:  # without what the decoder's own use of it would add
            assert (gradient - together[name]).abs().max() > 1e-5
        else:
            torch.testing.assert_close(gradient, together[name], rtol=1e-5, atol=1e-8)
    _, decoder = gradients_at("frozen: [encoder, memory_attention]", 0)
    total = alone[EMBEDDING] + decoder[EMBEDDING]
    torch.testing.assert_close(total, together[EMBEDDING], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "groups", "embedding"),
    [
        ("", {0: {"encoder", "memory_attention", "decoder"}}, 0),
        ("unfreeze: {encoder: 4}", {0: {"memory_attention", "decoder"}, 4: {"encoder"}}, 0),
        ("unfreeze: {encoder: 4, decoder: 3}", {0: {"memory_attention"}, 3: {"decoder"}, 4: {"encoder"}}, 3),
        ("frozen: [encoder], unfreeze: {decoder: 3}", {0: {"memory_attention"}, 3: {"decoder"}}, 3),
        ("frozen: [encoder, decoder]", {0: {"memory_attention"}}, NEVER),
        ("frozen: [decoder], unfreeze: {memory_attention: 5}", {0: {"encoder"}, 5: {"memory_attention"}}, 0),
    ],
)
def test_parameters_are_grouped_by_the_step_from_which_they_train(
    options: str, groups: dict[int, set[str]], embedding: float
) -> None:
    """The embedding is in the first of the groups of its two components."""
    module = lane_module(lane_config(f"{{name: smat, steps: 9, {options}}}"))
    names = {parameter: name for name, parameter in module.named_parameters()}
    shared = module.encoder.embedding.weight
    found = module.parameter_groups()
    assert list(found) == sorted(groups)
    for start, parameters in found.items():
        own = [parameter for parameter in parameters if parameter is not shared]
        assert len(own) == len(parameters) - (start == embedding)
        assert {names[parameter].partition(".")[0] for parameter in own} == groups[start]
    every = [parameter for parameters in found.values() for parameter in parameters]
    assert len(every) == len(set(every)) == sum(p.requires_grad for p in module.parameters())
