"""Tokens that tensor-parallel ranks divide between products: single layers and passes of the model against
whole ones, for any number of tokens, and what autograd keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.expert_cases import canonical_values
from helpers.launch import run_function
from torch import nn

from rxt_dist.config import AttentionConfig, MoEConfig
from rxt_dist.model import SequenceLayout
from rxt_dist.model.attention import CrossAttention, SelfAttention
from rxt_dist.model.canonical import canonical_parts
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.memory import stm_groups
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.regions import gather_slices, gathered_products, scatter_parts, slice_of
from rxt_dist.parallel.tensor_attention import TensorCrossAttention, TensorSelfAttention
from rxt_dist.parallel.tensor_layers import Pass, TensorRank
from rxt_dist.parallel.tensor_moe import SlicedMoE, split_feed_forward

RANKS, WIDTH, MEMORY_ROWS = 3, 24, 5
ROWS = (0, 1, 2, 4, 6, 7)
"""Of a pass: none, fewer than ranks, not divisible by them, and divisible."""


def regions(folder: Path) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    found = {}
    for rows in ROWS:
        own = values_of(rows, 2)[slice_of(rows, group)].requires_grad_()
        whole = gather_slices(own, rows, group)
        (whole * values_of(rows, 2) * (rank + 1)).sum().backward()
        parts = (values_of(rows, 4) * (rank + 1)).requires_grad_()
        summed = scatter_parts(parts.T.contiguous().T, group)
        (summed * values_of(rows, 4)[slice_of(rows, group)]).sum().backward()
        first, second = (values_of(size, 2, 10 * size + rank).requires_grad_() for size in (3, 5))
        x = values_of(rows, 2)[slice_of(rows, group)].requires_grad_()
        products = gathered_products(x, [first, second], rows, group)
        (sum(product.square().sum() for product in products)).backward()
        found[str(rows)] = [
            whole.detach(), own.grad, summed.detach(), parts.grad,
            *(product.detach() for product in products), x.grad, first.grad, second.grad,
        ]  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")


def values_of(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * 100 + seed))


def test_rows_are_gathered_and_scattered(tmp_path: Path) -> None:
    assert run_function(RANKS, regions, tmp_path) == [0] * RANKS
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for rows in ROWS:
        count = -(-rows // RANKS)
        narrow, wide = values_of(rows, 2), values_of(rows, 4)
        x = narrow.clone().requires_grad_()
        matrices = [
            [values_of(n, 2, 10 * n + rank).requires_grad_() for n in (3, 5)] for rank in range(RANKS)
        ]
        torch.stack([(x @ one.T).square().sum() for own in matrices for one in own]).sum().backward()
        for rank, found in enumerate(one[str(rows)] for one in ranks):
            own, (first, second) = slice(rank * count, (rank + 1) * count), matrices[rank]
            expected = [
                narrow, 6 * narrow[own], 6 * wide[own], wide,
                x.detach() @ first.T, x.detach() @ second.T, x.grad[own], first.grad, second.grad,
            ]  # fmt: skip
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)


def layers() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        "feed-forward": FeedForward(WIDTH, 12, gated=True, activation="silu"),
        "plain feed-forward": FeedForward(WIDTH, 12, gated=False, activation="gelu"),
    }
    for query, kv in ((12, 6), (6, 2), (3, 6), (2, 6)):
        heads = AttentionConfig(query_heads=query, kv_heads=kv, gated=query != 6, qk_norm=True)
        found[f"self {query} {kv}"] = SelfAttention(WIDTH, 4, heads, causal=True)
        found[f"cross {query} {kv}"] = CrossAttention(WIDTH, 4, heads, causal=False)
    for shared, bias in ((0, "global"), (1, "local"), (2, "local"), (3, "global")):
        config = MoEConfig(
            num_experts=4, top_k=2, num_shared_experts=shared, shared_expert_dim=6 if shared else None,
            bias=bias, shared_bias=bias, aux_loss="switch", z_loss_weight=0.1,
        )  # fmt: skip
        found[f"moe {shared}"] = MoE(config, WIDTH, 12, gated=shared != 1, activation="silu")
    for layer in found.values():
        initialise(layer, 4)
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return found


def divided(whole: nn.Module, tensor: TensorRank) -> nn.Module:
    if isinstance(whole, SelfAttention):
        return TensorSelfAttention(whole, tensor)
    if isinstance(whole, CrossAttention):
        return TensorCrossAttention(whole, tensor)
    if isinstance(whole, MoE):
        return SlicedMoE(whole, tensor)
    assert isinstance(whole, FeedForward)
    split_feed_forward(whole, tensor)
    return whole


def run(layer: nn.Module, x: torch.Tensor, rows: int, memory: torch.Tensor) -> torch.Tensor:
    """The layer's result for ``x``, all of ``rows`` tokens or a slice of them, plus sums over tokens.

    ``memory`` are all of MEMORY_ROWS rows, or a slice of them.
    """
    layout = SequenceLayout.from_lengths([rows - rows // 3, rows // 3])
    if isinstance(layer, MoE):
        layer.loads = torch.zeros(4, dtype=torch.int64)
        out, sums = layer(x)
        assert sums.balance is not None
        assert sums.z is not None
        return torch.cat([out.flatten(), 3 * sums.balance.view(1), 5 * sums.z.view(1)])
    if isinstance(layer, SelfAttention):
        return layer(x, layout.self_attention, None).flatten()
    if isinstance(layer, CrossAttention):
        groups = stm_groups(1, MEMORY_ROWS, layout)
        return layer(x, layer.read(memory), groups, None).flatten()
    return layer(x).flatten()


def loss_of(out: torch.Tensor, rows: int, own: slice) -> torch.Tensor:
    """Of outputs of the tokens ``own``, and of what follows them, which are sums over tokens."""
    factors = values_of(rows, WIDTH, 3)[own].flatten()
    return (out[: len(factors)] * factors).sum() + out[len(factors) :].sum()


def compute(folder: Path) -> None:
    """Every layer on every rank: output, gradients of the input and of what is held, summed where partial."""
    group = dist.group.WORLD
    assert group is not None
    running = Pass()
    running.read = MEMORY_ROWS
    tensor = TensorRank(dist.get_rank(), RANKS, group, running)
    found: dict[str, Any] = {}
    for name in layers():
        for rows in ROWS:
            running.tokens, own = rows, slice_of(rows, group)
            part, source = divided(layers()[name], tensor), layers()[name]
            values = canonical_values(source, dict(source.named_parameters()))  # type: ignore[arg-type]
            for parameter, pieces in canonical_parts(part).items():
                for piece in pieces:
                    target = part.get_parameter(parameter).data.view(-1)
                    piece.of(target).copy_(piece.taken_from(values[piece.name].detach()))
            x = values_of(rows, WIDTH)[own].requires_grad_()
            memory = values_of(MEMORY_ROWS, WIDTH)[slice_of(MEMORY_ROWS, group)].requires_grad_()
            out = run(part, x, rows, memory)
            loss_of(out, rows, own).backward()
            for prefix, module in part.named_modules():
                for parameter in getattr(module, "partial_parameters", list)():
                    gradient = part.get_parameter(f"{prefix}.{parameter}".strip(".")).grad
                    dist.all_reduce(gradient)
            gradients: dict[str, list[Any]] = {}
            for parameter, pieces in canonical_parts(part).items():
                flat = part.get_parameter(parameter).grad.view(-1)  # type: ignore[union-attr]
                for piece in pieces:
                    box = piece.of(flat).view(piece.box.sizes)
                    gradients.setdefault(piece.name, []).append((list(piece.box.starts), box))
            found[f"{name}, {rows}"] = {
                "out": out.detach(), "x": x.grad, "memory": memory.grad, "gradients": gradients,
                "loads": getattr(part, "loads", None),
            }  # fmt: skip
    torch.save(found, folder / f"{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layers")
    assert run_function(RANKS, compute, folder) == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", list(layers()))
def test_layers_are_the_whole_ones(computed: list[dict[str, Any]], name: str, rows: int) -> None:
    whole, count = layers()[name], -(-rows // RANKS)
    x, memory = (values_of(count, WIDTH).requires_grad_() for count in (rows, MEMORY_ROWS))
    out = run(whole, x, rows, memory)
    loss_of(out, rows, slice(0, rows)).backward()
    zeros = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in whole.named_parameters()}
    wanted = canonical_values(whole, zeros)
    ranks = [found[f"{name}, {rows}"] for found in computed]
    extra = 2 if isinstance(whole, MoE) else 0
    tokens = torch.cat([found["out"][: len(found["out"]) - extra] for found in ranks])
    torch.testing.assert_close(tokens, out.detach()[: len(out) - extra], rtol=1e-5, atol=1e-5)
    if isinstance(whole, MoE):
        sums = torch.stack([found["out"][-2:] for found in ranks]).sum(dim=0)
        torch.testing.assert_close(sums, out.detach()[-2:], rtol=1e-5, atol=1e-5)
        assert all(torch.equal(found["loads"], whole.loads) for found in ranks)
    torch.testing.assert_close(torch.cat([f["x"] for f in ranks]), x.grad, rtol=1e-4, atol=1e-5)
    if isinstance(whole, CrossAttention):
        found_memory = torch.cat([found["memory"] for found in ranks])
        torch.testing.assert_close(found_memory, memory.grad, rtol=1e-4, atol=1e-5)
    assert [len(found["x"]) for found in ranks] == [
        max(0, min(count, rows - r * count)) for r in range(RANKS)
    ]
    for key, gradient in wanted.items():
        shares = [(starts, box) for found in ranks for starts, box in found["gradients"][key]]
        if ".experts." in f".{key}":  # each rank sent its own tokens through a copy of all
            shares = [([0] * gradient.dim(), torch.stack([box for _, box in shares]).sum(dim=0))]
        covered = torch.zeros_like(gradient)
        for starts, box in shares:
            place = tuple(slice(s, s + n) for s, n in zip(starts, box.shape, strict=True))
            torch.testing.assert_close(box, gradient[place], rtol=1e-4, atol=1e-5, msg=f"{name}, {key}")
            covered[place] += 1
        assert bool((covered > 0).all()), key
