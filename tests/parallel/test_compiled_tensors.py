"""Layers whose tensors ranks share, compiled: one graph with the messages inside, whatever the tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.launch import run_function
from torch import nn
from torch._dynamo.utils import counters

from rxt_dist.config import MoEConfig
from rxt_dist.kernels.compilation import compiled, set_compile
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.regions import slice_of
from rxt_dist.parallel.tensor_layers import Pass, TensorRank
from rxt_dist.parallel.tensor_moe import SlicedMoE, split_feed_forward

RANKS, WIDTH = 2, 16
ROWS = (6, 7, 8, 13)
"""Of the passes: slices of equal lengths, and a last one that is shorter."""


def layer_of(name: str, tensor: TensorRank) -> nn.Module:
    """A layer with this rank's part of its tensors, of any values."""
    layer: nn.Module
    if name == "feed-forward":
        layer = FeedForward(WIDTH, 32, gated=True, activation="silu")
        split_feed_forward(layer, tensor)
    else:
        shared = MoEConfig(num_experts=4, top_k=2, num_shared_experts=2, weighted_shared_experts=True)
        layer = SlicedMoE(MoE(shared, WIDTH, 32, gated=True, activation="silu"), tensor)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return layer.bfloat16()


def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = layer(x)
    out: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return out


def gradients(function: object, layer: nn.Module, tensor: TensorRank, rows: int) -> list[torch.Tensor]:
    """The result for some tokens, of which a rank has all or its slice, and all gradients."""
    generator = torch.Generator().manual_seed(rows)
    x, weights = (torch.randn(rows, WIDTH, generator=generator).bfloat16() for _ in range(2))
    if tensor.sliced is not None:
        tensor.sliced.tokens = rows
        own = slice_of(rows, tensor.ranks)
        x, weights = x[own], weights[own]
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = function(layer, x)  # type: ignore[operator]
    (out * weights).sum().backward()
    found = [out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [one.clone() for one in found if one is not None]


def compile_layer(folder: Path, name: str, sliced: bool) -> None:
    """Passes of several lengths, without a compiler and with one that makes no code; the graphs it saw."""
    rank = dist.get_rank()
    tensor = TensorRank(rank, RANKS, dist.group.WORLD, Pass() if sliced else None)
    layer = layer_of(name, tensor)
    set_compile(True, with_messages=True)
    fast = torch.compile(forward, dynamic=True, fullgraph=True, backend="aot_eager")
    found = [[gradients(function, layer, tensor, rows) for rows in ROWS] for function in (forward, fast)]
    torch.save((found, counters["stats"]["unique_graphs"]), folder / f"{rank}.pt")


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("name", ["feed-forward", "experts"])
def test_one_graph_for_all_numbers_of_tokens(tmp_path: Path, name: str, sliced: bool) -> None:
    assert run_function(RANKS, compile_layer, tmp_path, name, sliced) == [0] * RANKS
    for rank in range(RANKS):
        (plain, fast), graphs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert graphs == 1, rank
        for left, right in zip(plain, fast, strict=True):
            assert len(left) == len(right) > 3
            for one, other in zip(left, right, strict=True):
                torch.testing.assert_close(other, one, rtol=2**-6, atol=2**-6 * float(one.abs().max()))


def code_of_backward(folder: Path) -> None:
    from torch._inductor.utils import run_fw_bw_and_get_code

    tensor = TensorRank(dist.get_rank(), RANKS, dist.group.WORLD)
    layer = layer_of("feed-forward", tensor)
    for messages in (False, True):
        torch.compiler.reset()
        set_compile(True, with_messages=messages)
        region = compiled(forward)
        x = torch.randn(8, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        _, codes = run_fw_bw_and_get_code(lambda x=x, region=region: region(layer, x))
        (folder / f"{messages}-{dist.get_rank()}.txt").write_text(codes[-1])


@pytest.mark.slow
def test_messages_travel_beside_products(tmp_path: Path) -> None:
    """The sum of gradients is started before both weights' gradients and waited for behind them."""
    assert run_function(RANKS, code_of_backward, tmp_path) == [0] * RANKS
    steps = re.compile(r"extern_kernels\.mm|_functional\.all_reduce_|_functional\.wait_tensor")
    for rank in range(RANKS):
        between = {}
        for messages in (False, True):
            code = (tmp_path / f"{messages}-{rank}.txt").read_text()
            order = [step.split(".")[-1] for step in steps.findall(code)]
            assert order.count("mm") == 4
            between[messages] = order[order.index("all_reduce_") + 1 : order.index("wait_tensor")]
        assert between == {False: [], True: ["mm"] * 2}
