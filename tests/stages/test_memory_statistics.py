"""Statistics of the memory, against plain loops over conversations, layers and pairs of slots."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lanes import (
    Lanes,
    MemoryPieces,
    fresh_stm,
    lane_config,
    lane_model,
    lane_module,
    random_conversations,
    timeline,
    windows,
)

from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.stages.expert_statistics import EXPERT_STATISTICS
from rxt_dist.stages.memory_statistics import MEMORY_STATISTICS, MemorySums, gate_sums

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
LANES = 4


def naive(memories: list[torch.Tensor], gates: list[torch.Tensor]) -> dict[str, float]:
    """The definitions: ``memories`` [L, S, D] of every lane; ``gates`` any shapes."""
    stacked = torch.stack(memories).double().numpy()
    mean = stacked.mean(axis=0)
    cosines = []
    for memory, layer in itertools.product(stacked, range(stacked.shape[1])):
        for a, b in itertools.permutations(memory[layer], 2):
            cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    values = np.concatenate([gate.double().flatten().numpy() for gate in gates])
    return {
        "memory_rms": math.sqrt((stacked**2).mean()),
        "memory_between_share": ((stacked - mean) ** 2).sum() / (stacked**2).sum(),
        "memory_slot_cosine": float(np.mean(cosines)),
        "write_gate_mean": values.mean(),
        "write_gate_std": values.std(),
    }


def test_the_statistics_are_their_definitions_however_the_lanes_are_divided() -> None:
    generator = torch.Generator().manual_seed(1)
    stm = torch.randn(2, 7, 5, 8, generator=generator) * 3 + torch.randn(2, 1, 5, 8, generator=generator)
    gates = torch.rand(2, 7, 5, 1, generator=generator)
    written = torch.tensor([True, False, True, True, True, False, True])
    lanes = [lane for lane in range(7) if written[lane]]
    expected = naive([stm[:, lane] for lane in lanes], [gates[:, lane] for lane in lanes])
    for parts in ([7], [1, 6], [3, 3, 1]):
        sums = MemorySums([2, 5, 8], torch.device("cpu"))
        for part, own, gate in zip(
            stm.split(parts, 1), written.split(parts), gates.split(parts, 1), strict=True
        ):
            # What was never written to, NaN included, does not count.
            hidden = torch.where(own[:, None, None], part, float("nan"))
            sums.add_memory(hidden, own)
            sums.add_gates(gate_sums(torch.where(own[:, None, None], gate, float("nan")), own, part.shape))
        found = sums.statistics()
        assert tuple(found) == MEMORY_STATISTICS
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_gate_may_be_one_number_for_all_lanes_or_slots() -> None:
    present, shape = torch.tensor([True, False, True]), torch.Size([2, 3, 5, 8])
    whole = torch.rand(2, 3, 5, 1)
    for gate in (whole, whole[:, :1], whole[:, :, :1], whole[:, :1, :1]):
        kept = gate.expand(2, 3, 5, 1)[:, present].double()
        expected = [kept.sum(), (kept**2).sum(), kept.numel()]
        torch.testing.assert_close(
            gate_sums(gate, present, shape), torch.stack([*map(torch.as_tensor, expected)])
        )
    assert not gate_sums(None, present, shape).any()


def test_extremes() -> None:
    device, everywhere = torch.device("cpu"), torch.ones(3, dtype=torch.bool)
    nothing = MemorySums([2, 5, 8], device)
    assert set(nothing.statistics().values()) == {None}
    nothing.add_memory(torch.zeros(2, 3, 5, 8), everywhere)
    assert set(nothing.statistics().values()) == {None}, "a memory of zeros has no directions"
    alike = MemorySums([2, 5, 8], device)
    alike.add_memory(torch.ones(2, 3, 5, 8), everywhere)
    found = alike.statistics()
    assert found["memory_between_share"] == pytest.approx(0.0, abs=1e-12)
    assert found["memory_slot_cosine"] == pytest.approx(1.0)
    assert found["memory_rms"] == pytest.approx(1.0)
    single = MemorySums([2, 1, 8], device)
    single.add_memory(torch.randn(2, 3, 1, 8), everywhere)
    assert single.statistics()["memory_slot_cosine"] is None


def plain_gate(model: RxTModel, stm: torch.Tensor, interaction: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The STM after a write, and the value of its gate."""
    layout = SequenceLayout.from_lengths([len(interaction.tokens)])
    gates: dict[str, torch.Tensor] = {}
    encoded = model.encoder(torch.tensor(interaction.tokens), layout)
    return model.memory_attention(stm, encoded, layout, None, gates), gates["gate"]


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize(("stage", "window"), [("smat", 1), ("smat", 3), ("memory_attention", 3)])
@torch.no_grad()
def test_a_step_reports_what_its_lanes_hold_and_what_it_wrote(stage: str, window: int, micro: int) -> None:
    config = lane_config(f"{{name: {stage}, steps: 9}}")
    module, model = lane_module(config), lane_model(config)
    source, lanes = MemoryPieces(random_conversations(COUNTS)), Lanes(module, config)
    places = timeline(source, LANES, 6 * window)
    stms: dict[int, torch.Tensor] = {}
    with windows(source, window=window, micro=micro, look_back=stage == "smat") as steps:
        for number in range(6):
            module.observe(torch.device("cpu"))
            step = next(steps)
            lanes.step(step)
            observed = module.observations(step.counts)
            found = {name: value for name, value in observed.items() if name not in EXPERT_STATISTICS}
            gates, written, resets = [], {}, 0
            for row in places[number * window : (number + 1) * window]:
                for lane, place in enumerate(row):
                    conversation = source.conversations[place.conversation]
                    if place.number == 0:
                        stms[lane] = fresh_stm(config, place.visit)
                        resets += 1
                    back = 1 if stage == "smat" else 0
                    written[lane] = place.number >= back
                    if written[lane]:
                        one = conversation[place.number - back]
                        stms[lane], gate = plain_gate(model, stms[lane], one)
                        gates.append(gate)
            held = [stms[lane][:, 0] for lane in range(LANES) if written[lane]]
            assert found["reset_share"] == resets / (LANES * window)
            del found["reset_share"]
            if held:
                assert found == pytest.approx(naive(held, gates), rel=1e-5)
            else:
                assert found["memory_rms"] is None


def test_what_is_not_observed_costs_nothing() -> None:
    config = lane_config()
    module = lane_module(config)
    module.observe(torch.device("cpu"))
    module.observe(None)
    assert module.memory_sums is None
    with windows(MemoryPieces(random_conversations(COUNTS)), window=2) as steps:
        Lanes(module, config).step(next(steps))


def test_a_model_without_a_write_gate_has_no_gate_statistics() -> None:
    config = lane_config(model__memory_attention__gate="{type: 'off'}")
    module = lane_module(config)
    module.observe(torch.device("cpu"))
    lanes = Lanes(module, config)
    with windows(MemoryPieces(random_conversations([5] * 4)), window=2) as steps:
        step = next(steps)
        lanes.step(step)
    found = module.observations(step.counts)
    assert (found["write_gate_mean"], found["write_gate_std"]) == (None, None)
    assert found["memory_rms"] is not None
