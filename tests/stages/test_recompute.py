"""Recomputation changes neither loss, metrics nor gradients, and keeps little else of a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.lanes import (
    Conversation,
    Interaction,
    Lanes,
    MemoryPieces,
    gradients,
    lane_config,
    lane_module,
    random_conversations,
    windows,
)

from rxt_dist.kernels.cross_entropy import ProjectionGradients

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
STAGES = {
    "smat": "{name: smat, steps: 9, system_prompts: true}",
    "smat, frozen": "{name: smat, steps: 9, frozen: [decoder], unfreeze: {memory_attention: 1}}",
    "memory_attention": "{name: memory_attention, steps: 9, noise_level: 0.1, label_noise_level: 0.1, "
    "label_weight_jitter: 0.15, stm_difference_scale: 0.1, unused_slots: reference}",
}


def two_steps(
    stage: str, recompute: str, window: int, conversations: list[Conversation]
) -> tuple[list[Any], list[int]]:
    """Loss, metrics, gradients, carried STM and statistics of two steps, and the bytes kept for backward."""
    config = lane_config(STAGES[stage], runtime__recompute=recompute)
    module, smat = lane_module(config), stage.startswith("smat")
    lanes = Lanes(module, config)
    prompts = [[2, 9, 10 + number] if number % 2 else [] for number in range(len(COUNTS))]
    source = MemoryPieces(conversations, prompts[: len(conversations)])
    found, kept = [], []
    with windows(source, window=window, look_back=smat, system_prompts="prompts" in STAGES[stage]) as steps:
        for _ in range(2):
            saved: dict[int, int] = {}

            def pack(value: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
                storage = value.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
                return value

            module.observe(torch.device("cpu"))
            step = next(steps)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                loss, metrics = lanes.step(step)
            kept.append(sum(saved.values()))
            values = gradients(module, loss)
            found.append(
                (loss.detach(), metrics, values, lanes.stm.clone(), module.observations(step.counts))
            )
            module.step += 1
    return found, kept


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("window", [1, 3, 8])
def test_nothing_changes(stage: str, window: int) -> None:
    expected, _ = two_steps(stage, "none", window, random_conversations(COUNTS))
    found, _ = two_steps(stage, "interaction", window, random_conversations(COUNTS))
    # Positions that are computed together differ in the order of additions.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
    # Or an equal gradient would say nothing.
    assert any(gradient.any() for name, gradient in expected[1][2].items() if name.startswith("memory_att"))


@pytest.mark.parametrize("stage", ["smat", "memory_attention"])
def test_memory_hardly_grows_with_the_window(stage: str) -> None:
    """What one more interaction keeps: all of its activations, or just the STM."""
    equal = [[Interaction.of([7, 8, 9], [10, 11])] * 20] * 4
    kept = {
        (recompute, window): two_steps(stage, recompute, window, equal)[1][1]
        for recompute in ("none", "interaction")
        for window in (1, 4, 8)
    }
    assert kept["interaction", 1] == kept["none", 1], "a single interaction has nothing to gain"
    per_interaction = {name: (kept[name, 8] - kept[name, 4]) / 4 for name in ("none", "interaction")}
    stm = 4 * 2 * 4 * 6 * 64  # bytes of fp32 [L, lanes, S, D]
    assert per_interaction["none"] > 10 * stm
    assert per_interaction["interaction"] == stm


def test_a_head_multiplies_its_gradients_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a pass that is run again."""
    rows: list[int] = []
    add = ProjectionGradients.add

    def counted(self: ProjectionGradients, part: slice, gradient: torch.Tensor, repeated: int) -> None:
        rows.append(len(gradient))
        add(self, part, gradient, repeated)

    monkeypatch.setattr(ProjectionGradients, "add", counted)
    two_steps("smat", "none", 3, random_conversations(COUNTS))
    together = sum(rows)
    rows.clear()
    two_steps("smat", "interaction", 3, random_conversations(COUNTS))
    assert sum(rows) == together > 0
