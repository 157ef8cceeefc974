"""The load of experts, counted while tokens run through them, against counting by hand."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from rxt_dist.config import MoEConfig
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import MoE
from rxt_dist.stages.expert_statistics import EXPERT_STATISTICS, count_loads, load_statistics, not_counted

E, D = 4, 8


def layers(count: int = 2, experts: int = E, top_k: int = 2) -> nn.ModuleList:
    found = nn.ModuleList()
    for seed in range(count):
        config = MoEConfig(num_experts=experts, top_k=top_k)
        found.append(MoE(config, D, 8, gated=True, activation="silu"))
        initialise(found[-1], seed)
    return found


def test_statistics_of_two_layers_and_several_passes() -> None:
    model = layers()
    with torch.no_grad():
        model[1].router.proj.weight[:2] = 1.0  # positive rows go to the first two
        model[1].router.proj.weight[2:] = -1.0
    counted = [[0] * E for _ in model]
    count_loads(model, torch.device("cpu"))
    for seed in range(3):
        x = torch.rand(5 + seed, D, generator=torch.Generator().manual_seed(seed))
        for number, layer in enumerate(model):
            layer(x)
            for row in x:
                for expert in torch.topk(layer.router.proj(row)[:E], 2).indices.tolist():
                    counted[number][expert] += 1
    found = load_statistics(model)
    assert tuple(found) == EXPERT_STATISTICS
    entropies, peaks = [], []
    for loads in counted:
        shares = [load / sum(loads) for load in loads]
        entropies.append(-sum(share * math.log(share) for share in shares if share) / math.log(E))
        peaks.append(max(shares) * E)
    assert counted[1][2:] == [0, 0]
    assert found["expert_load_entropy"] == pytest.approx(sum(entropies) / 2)
    assert found["expert_load_max"] == pytest.approx(max(peaks))
    assert found["dead_experts"] == sum(load == 0 for loads in counted for load in loads)


def test_what_is_computed_again_is_not_counted_and_counting_ends() -> None:
    model = layers(1)
    count_loads(model, torch.device("cpu"))
    model[0](torch.rand(6, D))
    before = load_statistics(model)
    with contextlib.suppress(RuntimeError), not_counted(model):
        model[0](torch.ones(50, D))
        raise RuntimeError
    assert load_statistics(model) == before
    count_loads(model, None)
    model[0](torch.rand(6, D))
    assert load_statistics(model) == {}


def test_no_tokens_and_a_single_expert() -> None:
    model = layers(1)
    count_loads(model, torch.device("cpu"))
    assert load_statistics(model) == {"expert_load_entropy": 0.0, "expert_load_max": 0.0, "dead_experts": E}
    single = layers(1, experts=1, top_k=1)
    count_loads(single, torch.device("cpu"))
    single[0](torch.rand(3, D))
    assert load_statistics(single) == {"expert_load_entropy": 1.0, "expert_load_max": 1.0, "dead_experts": 0}


def test_a_dense_module_has_none() -> None:
    model = nn.Linear(2, 2)
    count_loads(model, torch.device("cpu"))
    assert load_statistics(model) == {}
