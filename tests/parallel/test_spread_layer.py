"""A layer with spread experts against the whole layer, and how it is compiled."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.launch import run_function
from helpers.spread_experts import spread_experts
from torch._dynamo.utils import counters

from rxt_dist.config import AttentionConfig, MoEConfig
from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.kernels.compilation import set_compile
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.layer import Layer
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.spread_layer import SpreadLayer

D, E, K, RANKS = 32, 8, 3, 2
MIXTURES: dict[str, dict[str, Any]] = {
    "routed": {},
    "shared": {"num_shared_experts": 2, "weighted_shared_experts": True, "bias": "global"},
}


def whole_layer(mixture: str) -> Layer:
    config = MoEConfig(num_experts=E, top_k=K, z_loss_weight=0.1, **MIXTURES[mixture])
    moe = MoE(config, D, 2 * D, gated=True, activation="silu")
    attention = AttentionConfig(query_heads=2, kv_heads=1)
    layer = Layer(D, 16, attention, moe, causal=True, norm="rms", cross_attention=attention)
    initialise(layer, 1)
    return layer


def spread(layer: Layer) -> SpreadLayer:
    assert isinstance(layer.feed_forward, MoE)
    spread_experts(layer.feed_forward)
    return SpreadLayer(layer)


@cache  # on a CPU, what a layout prepares in its first pass breaks graphs
def batch_of(number: int) -> tuple[torch.Tensor, torch.Tensor, AttentionLayout]:
    """Tokens, rows of a memory and where sequences begin, other ones and more of them with every number."""
    generator = torch.Generator().manual_seed(number)
    count = 24 + 8 * number
    ends = torch.arange(0, count + 1, 8, dtype=torch.int32)
    x, memory = (torch.randn(count, D, generator=generator) for _ in range(2))
    return x, memory, AttentionLayout(ends, ends, 8, 8)


def run(layer: Layer, number: int, dtype: torch.dtype) -> dict[str, Any]:
    x, memory, layout = batch_of(number)
    x, memory = (part.to(dtype, copy=True).requires_grad_() for part in (x, memory))
    layer.zero_grad()
    out, losses = layer(x, layout, None, memory, layout)
    assert losses is not None
    assert losses.balance is not None
    assert losses.z is not None
    ((out * torch.arange(D)).sum() + losses.balance + losses.z).backward()
    return {
        "out": out.detach(),
        "losses": (losses.balance.detach(), losses.z.detach()),
        "x": x.grad,
        "memory": memory.grad,
        "parameters": {name: one.grad for name, one in layer.named_parameters()},
    }


def run_both(folder: Path, mixture: str) -> None:
    layer = spread(whole_layer(mixture))
    torch.save(run(layer, dist.get_rank(), torch.float32), folder / f"{dist.get_rank()}.pt")


@pytest.mark.parametrize("mixture", MIXTURES)
def test_it_is_the_whole_layer(tmp_path: Path, mixture: str) -> None:
    assert run_function(RANKS, run_both, tmp_path, mixture) == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    expected = [run(whole_layer(mixture), rank, torch.float32) for rank in range(RANKS)]
    for rank, (one, whole) in enumerate(zip(found, expected, strict=True)):
        for name in ("out", "losses", "x", "memory"):
            torch.testing.assert_close(one[name], whole[name], rtol=1e-5, atol=1e-5)
        assert one["parameters"].keys() == whole["parameters"].keys()
        for name, gradient in one["parameters"].items():
            gradients = [other["parameters"][name] for other in expected]
            if ".experts." in name:  # of the tokens of all ranks, for a part of the experts
                wanted = sum(gradients)[rank * E // RANKS :][: E // RANKS]
            else:
                wanted = gradients[rank]
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4, msg=name)


def compile_layer(folder: Path, mixture: str) -> None:
    """Passes of several lengths without a compiler and with it, and the graphs that were compiled."""
    layer = spread(whole_layer(mixture)).bfloat16()
    found = []
    for enabled in (False, True):
        set_compile(enabled)
        found.append([run(layer, number, torch.bfloat16) for number in (0, 1, 2)])
    torch.save((found, counters["stats"]["unique_graphs"]), folder / f"{dist.get_rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("mixture", "graphs"), [("routed", 1), ("shared", 2)])
def test_regions_around_the_messages_are_compiled(tmp_path: Path, mixture: str, graphs: int) -> None:
    """Before the messages, and after them where there is something to join."""
    assert run_function(RANKS, compile_layer, tmp_path, mixture) == [0] * RANKS
    for rank in range(RANKS):
        (plain, fast), compiled = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert compiled == graphs
        for left, right in zip(plain, fast, strict=True):
            for name in ("out", "x", "memory"):
                scale = float(left[name].abs().max())
                torch.testing.assert_close(right[name], left[name], rtol=2**-6, atol=2**-6 * scale)
