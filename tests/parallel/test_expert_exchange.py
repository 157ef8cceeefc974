"""The exchange of rows between expert ranks: values, gradients, empty runs, waiting, idle ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed
from helpers.expert_work import order_of_work
from helpers.host_waits import waits_of
from helpers.interpreter import interpreter  # noqa: F401
from helpers.launch import run_function
from helpers.spread_experts import spread_experts
from torch import nn

from rxt_dist.config import MoEConfig
from rxt_dist.kernels.compilation import compiled, set_compile
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import ExpertOrder, Experts, MoE
from rxt_dist.parallel.expert_messages import PassSizes, Traffic, add_up, back, lay_out, there
from rxt_dist.parallel.experts import ExpertParallel, uneven_passes
from rxt_dist.parallel.mesh import Mesh

D, HIDDEN, E, RANKS = 16, 12, 6, 3
K, MANY = 2, 4
"""Experts of a token; of so many, some are on a certain rank nearly always."""


def moe(top_k: int = K) -> MoE:
    layer = MoE(MoEConfig(num_experts=E, top_k=top_k), D, HIDDEN, gated=True, activation="silu")
    initialise(layer, 1)
    return layer


def rows_of(rank: int) -> torch.Tensor:
    """Positive numbers; rank 1 has no row at all."""
    return torch.rand(0 if rank == 1 else 5 + rank, D, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "ranks", "top_k", "own"),
    [(40, 6, 3, 2, 1), (7, 36, 12, 9, 0), (33, 8, 8, 3, 5), (9, 4, 2, 1, 1), (0, 4, 4, 2, 0)],
)
def test_what_a_rank_sends(
    tokens: int,
    experts: int,
    ranks: int,
    top_k: int,
    own: int,
    kernels: bool,
    request: pytest.FixtureRequest,
) -> None:
    if kernels:
        request.getfixturevalue("interpreter")
    whole = Experts(experts, D, HIDDEN, gated=True, activation="silu", biased=True)
    group = cast(dist.ProcessGroup, None)
    part = ExpertParallel(whole, top_k, Mesh(ranks, expert_size=ranks), own, group, PassSizes(group))
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(2)) - 0.5
    leaving = part.depart(chosen, weights, active=True)
    visited = [{expert // (experts // ranks) for expert in one} for one in chosen.tolist()]
    others = [rank for rank in range(ranks) if rank != own]
    sent = [(token, rank) for rank in others for token in range(tokens) if rank in visited[token]]
    assert leaving.order is not None
    assert leaving.inverse is not None
    assert leaving.counts is not None
    travelling = leaving.order[: len(sent)] // (ranks - 1)
    assert travelling.tolist() == [token for token, _ in sent]
    places = {way: place for place, way in enumerate(sent)}
    assert leaving.inverse.view(-1, ranks - 1).tolist() == [
        [places.get((token, rank), -1) for rank in others] for token in range(tokens)
    ]
    assert leaving.counts.tolist() == [
        [sum(way[1] == rank for way in sent), int((chosen // (experts // ranks) == rank).sum()), 1]
        for rank in range(ranks)
    ]
    here = (chosen // (experts // ranks) == own).flatten()
    everyone = torch.cat([weights.view(torch.int32), chosen.int()], dim=1)
    assert torch.equal(leaving.choices[: len(sent)], everyone[travelling])
    came, came_chosen = part.arrive(everyone, torch.float32)
    assert torch.equal(came, weights)
    assert torch.equal(came_chosen, chosen)
    assert torch.equal(leaving.chosen, chosen)
    order = ExpertOrder.of_some(came_chosen, part.held)
    assert torch.equal(order.inverse >= 0, here)
    rows = order.first(int(here.sum()))
    assert torch.equal(rows.expert_of_row + part.held.start, chosen.flatten()[rows.order])


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_a_rank_sends_of_which_all_travels(ranks: int) -> None:
    whole = Experts(E, D, HIDDEN, gated=True, activation="silu", biased=True)
    group = cast(dist.ProcessGroup, None)
    part = ExpertParallel(whole, MANY, Mesh(ranks, expert_size=ranks), 1, group, PassSizes(group))
    chosen = torch.rand(7, E, generator=torch.Generator().manual_seed(1)).topk(MANY).indices
    weights = torch.rand(7, MANY, generator=torch.Generator().manual_seed(2)) - 0.5
    leaving = part.depart(chosen, weights, active=False)
    assert (leaving.order, leaving.inverse, leaving.counts, leaving.active) == (None, None, None, False)
    assert torch.equal(leaving.chosen, chosen)
    for one in leaving.choices.chunk(ranks - 1):
        came, came_chosen = part.arrive(one, torch.float32)
        assert torch.equal(came, weights)
        assert torch.equal(came_chosen, chosen)
    x = torch.randn(7, D)
    laid_out = lay_out(x, None, None, ranks - 1)
    assert torch.equal(laid_out, torch.cat([x] * (ranks - 1)))
    returned = torch.randn(7 * (ranks - 1), D)
    torch.testing.assert_close(add_up(returned, None, ranks - 1), returned.view(ranks - 1, 7, D).sum(0))


@contextmanager
def messages() -> Iterator[list[tuple[list[int], int]]]:
    """Of every exchange of this rank: rows to each rank, and bytes of a row of the first."""
    sent: list[tuple[list[int], int]] = []
    plain = dist.all_to_all_single

    def noted(out: torch.Tensor, rows: torch.Tensor, *splits: Any, **options: Any) -> Any:
        of_ranks = list(splits[1]) if splits else [len(rows) // RANKS] * RANKS
        assert sum(of_ranks) == len(rows)
        sent.append((of_ranks, rows[:1].nbytes if len(rows) else 0))
        return plain(out, rows, *splits, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", noted)
        yield sent


def train_once(folder: Path, lose_all: bool, top_k: int) -> None:
    """Forward and backward on every rank; with ``lose_all`` all tokens go to experts of the first ranks."""
    layer, rank = moe(top_k), dist.get_rank()
    if lose_all:
        _send_to_first(layer)
    experts = spread_experts(layer)
    x = rows_of(rank).requires_grad_()
    out: list[torch.Tensor] = []
    with messages() as sent:
        forward = waits_of(lambda: out.append(layer(x)[0]))
        loss = (out[0] * torch.arange(D)).sum()
        backward = waits_of(loss.backward)
    torch.save(
        {
            "out": out[0].detach(),
            "grad": x.grad,
            "router": layer.router.proj.weight.grad,
            "first": experts.first_expert,
            "experts": {name: p.grad for name, p in experts.named_parameters()},
            "syncs": [forward, backward],
            "sent": sent,
        },
        folder / f"{rank}.pt",
    )


def _send_to_first(layer: MoE) -> None:
    with torch.no_grad():
        layer.router.proj.weight[: layer.config.top_k] += 1  # rows are positive
        layer.router.proj.weight[layer.config.top_k :] -= 1


@pytest.mark.parametrize("top_k", [K, MANY])
@pytest.mark.parametrize("lose_all", [False, True])
def test_spread_experts_are_the_whole_layer(tmp_path: Path, lose_all: bool, top_k: int) -> None:
    assert run_function(RANKS, train_once, tmp_path, lose_all, top_k) == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    layer = moe(top_k)
    if lose_all:
        _send_to_first(layer)
    inputs = [rows_of(rank).requires_grad_() for rank in range(RANKS)]
    out, _ = layer(torch.cat(inputs))
    (out * torch.arange(D)).sum().backward()
    torch.testing.assert_close(torch.cat([one["out"] for one in found]), out.detach())
    for one, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(one["grad"], x.grad)
        for name, gradient in one["experts"].items():
            whole = layer.experts.get_parameter(name).grad
            assert whole is not None
            torch.testing.assert_close(gradient, whole[one["first"] :][: len(gradient)], rtol=1e-5, atol=1e-5)
        # One copy of counts; the way back needs none.
        assert one["syncs"] == [["rxt_dist/expert_messages.py:read"], []]
    router = sum(one["router"] for one in found)
    torch.testing.assert_close(router, layer.router.proj.weight.grad, rtol=1e-4, atol=1e-4)
    idle = [one["experts"]["w_in"].abs().sum() for one in found]
    assert (idle[top_k // (E // RANKS)] == 0) == lose_all


def train_some(folder: Path) -> None:
    """Gradients of the router and of experts where tokens, weights or both have none."""
    found = []
    for tokens, router in ((False, True), (True, False), (False, False)):
        layer, rank = moe(), dist.get_rank()
        experts = spread_experts(layer)
        layer.router.requires_grad_(router)
        x = rows_of(rank).requires_grad_(tokens)
        out = layer.run_experts(x, layer.router(x.detach()))
        (out * torch.arange(D)).sum().backward()
        found.append((x.grad, layer.router.proj.weight.grad, experts.w_in.grad))
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_what_has_no_gradient_sends_none(tmp_path: Path) -> None:
    assert run_function(RANKS, train_some, tmp_path) == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    layer = moe()
    inputs = [rows_of(rank).requires_grad_() for rank in range(RANKS)]
    out = layer.run_experts(torch.cat(inputs), layer.router(torch.cat(inputs).detach()))
    (out * torch.arange(D)).sum().backward()
    wanted = layer.router.proj.weight.grad, layer.experts.w_in.grad
    assert wanted[0] is not None
    assert wanted[1] is not None
    for case, (tokens, router) in enumerate(((False, True), (True, False), (False, False))):
        of_ranks = [one[case] for one in found]
        for rank, (of_tokens, of_router, of_experts) in enumerate(of_ranks):
            assert (of_tokens is None, of_router is None) == (not tokens, not router)
            if tokens:
                torch.testing.assert_close(of_tokens, inputs[rank].grad)
            held = slice(rank * E // RANKS, (rank + 1) * E // RANKS)
            torch.testing.assert_close(of_experts, wanted[1][held], rtol=1e-5, atol=1e-5)
        if router:
            total = sum(one[1] for one in of_ranks)
            torch.testing.assert_close(total, wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lose_all", [False, True])
def test_a_token_goes_once_to_a_rank(tmp_path: Path, lose_all: bool) -> None:
    """Whether one or both of its experts are there; back and forth, and its gradients."""
    assert run_function(RANKS, train_once, tmp_path, lose_all, K) == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True)["sent"] for rank in range(RANKS)]
    layer = moe()
    if lose_all:
        _send_to_first(layer)
    table = []  # tokens from each rank to each
    for rank in range(RANKS):
        chosen = layer.router(rows_of(rank)).experts.tolist()
        visited = [{expert // (E // RANKS) for expert in one} for one in chosen]
        others = [sum(other in ranks for ranks in visited) for other in range(RANKS)]
        others[rank] = 0  # they stay where they are
        table.append(others)
    assert lose_all or 0 < sum(map(sum, table)) < K * sum(len(rows_of(rank)) for rank in range(RANKS))
    row, weights = 4 * D, 4 * K
    for rank in range(RANKS):
        there, back = table[rank], [line[rank] for line in table]
        counts, *rest = found[rank]
        assert counts == ([1] * RANKS, 3 * 8)
        sizes = [2 * weights, row, row, row, row, weights]
        ways = [there, there, back, there, back, back]
        assert rest == [(way, size if sum(way) else 0) for way, size in zip(ways, sizes, strict=True)]


def more_rows_of(rank: int) -> torch.Tensor:
    return torch.randn(20 + rank, D, generator=torch.Generator().manual_seed(rank))


def note_order(folder: Path, top_k: int) -> None:
    layer, rank = moe(top_k), dist.get_rank()
    spread_experts(layer)
    x = more_rows_of(rank).requires_grad_()
    with order_of_work() as forward:
        out, _ = layer(x)
    with order_of_work() as backward:
        out.sum().backward()
    torch.save((forward, backward), folder / f"{rank}.pt")


@pytest.mark.parametrize("top_k", [K, MANY])
def test_own_rows_are_computed_while_messages_travel(tmp_path: Path, top_k: int) -> None:
    assert run_function(RANKS, note_order, tmp_path, top_k) == [0] * RANKS
    layer = moe(top_k)
    chosen = [layer.router(more_rows_of(rank)).experts // (E // RANKS) for rank in range(RANKS)]
    for rank in range(RANKS):
        staying = int((chosen[rank] == rank).sum())
        coming = sum(int((one == rank).sum()) for one in chosen) - staying
        assert 0 < staying != coming > 0
        own, others = f"{staying} rows", f"{coming} rows"
        forward, backward = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        choices = ["send", "wait", "read"] if top_k == MANY else ["send", "wait", "read", "send", "wait"]
        tokens = [own, "send", "wait", others, others, "send", own, "wait"]
        assert forward == [*choices, *tokens]
        there = ["send", own, own, "wait"]
        assert backward == [*there, *[others] * 4, "send", "send", own, own, "wait", "wait"]


def test_a_whole_layer_never_waits() -> None:
    layer = moe()
    x = rows_of(2).requires_grad_()

    def step() -> None:
        layer(x)[0].sum().backward()

    assert waits_of(step) == []


class Twice(nn.Module):
    """Two layers, as a decoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([moe(), moe()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def evaluate_unevenly(folder: Path) -> None:
    rank = dist.get_rank()
    model = Twice()
    for layer in model.layers:
        spread_experts(layer)
    found = []
    for _ in range(2):  # once more: nothing may be left over from the first time
        with torch.no_grad(), uneven_passes(model):
            found += [model(rows_of(rank) + number) for number in range((3, 0, 1)[rank])]
        total = torch.ones(())
        dist.all_reduce(total)
        assert total == RANKS
    torch.save(found, folder / f"{rank}.pt")


def test_ranks_may_make_different_numbers_of_passes(tmp_path: Path) -> None:
    assert run_function(RANKS, evaluate_unevenly, tmp_path) == [0] * RANKS
    model = Twice()
    for rank, passes in enumerate((3, 0, 1)):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(found) == 2 * passes
        for number, values in enumerate(found):
            expected = model(rows_of(rank) + number % max(1, passes)).detach()
            torch.testing.assert_close(values, expected)


def compile_parts(folder: Path) -> None:
    """Result and gradients of passes of different lengths, without a compiler and with it."""
    layer = MoE(MoEConfig(num_experts=E, top_k=K), D, 2 * D, gated=True, activation="silu")
    initialise(layer, 1)
    experts = spread_experts(layer)
    layer.bfloat16()
    run = compiled(lambda x: layer(2 * x)[0])
    found = []
    for enabled in (False, True):
        set_compile(enabled)
        for number in (0, 3, 4):
            x = torch.cat([rows_of(dist.get_rank())] * number or [torch.empty(0, D)]).bfloat16()
            x.requires_grad_()
            layer.zero_grad()
            out = run(x)
            (out * torch.arange(D)).sum().backward()
            found.append([out.detach(), x.grad, *(p.grad for p in experts.parameters())])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.save((found, graphs), folder / f"{dist.get_rank()}.pt")


@pytest.mark.slow
def test_compiled_parts(tmp_path: Path) -> None:
    assert run_function(RANKS, compile_parts, tmp_path) == [0] * RANKS
    for rank in range(RANKS):
        found, graphs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert graphs > 0
        for plain, fast in zip(found[:3], found[3:], strict=True):
            for left, right in zip(plain, fast, strict=True):
                scale = float(left.abs().max()) if left.numel() else 0.0
                torch.testing.assert_close(right, left, rtol=2**-6, atol=2**-7 * scale)


def exchange_back_and_forth(folder: Path) -> None:
    rank = dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    sent = [[0, 0, 2], [0, 0, 0], [1, 4, 0]][rank]
    received = [[0, 0, 1], [0, 0, 4], [2, 0, 0]][rank]
    tokens = torch.tensor([[0, 2, 1], [0], [1, 0, 1, 1, 0, 0]][rank])  # the last is nobody's
    traffic = Traffic(group, sent, received, any_active=True, rows=None)
    x = (torch.arange(6.0) + 100 * rank).view(-1, 2)
    came = there(x[tokens], traffic, "tokens").arrived()
    returned = back(came * (rank + 1), traffic, "sums").arrived()
    torch.save({"there": came, "back": returned}, folder / f"{rank}.pt")


def test_rows_come_back_to_where_they_were(tmp_path: Path) -> None:
    assert run_function(RANKS, exchange_back_and_forth, tmp_path) == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    first, second = [200, 201], [202, 203]  # rows of the last rank
    assert found[0]["there"].tolist() == [second]
    assert found[1]["there"].tolist() == [first, second, second, first]
    assert found[2]["there"].tolist() == [[0, 1], [4, 5]]
    assert found[0]["back"].tolist() == [[0, 3], [12, 15]]
    assert found[1]["back"].shape == (0, 2)
    expected = torch.tensor([second, first, second, second, first])
    assert torch.equal(found[2]["back"], expected * torch.tensor([1, 2, 2, 2, 2])[:, None])


def draw(folder: Path) -> None:
    join_deepspeed()
    layer = moe()
    experts = spread_experts(layer)
    initialise(layer, 9)
    torch.save((experts.first_expert, dict(experts.named_parameters())), folder / f"{dist.get_rank()}.pt")


def test_initial_experts_are_those_of_a_whole_layer(tmp_path: Path) -> None:
    assert run_function(RANKS, draw, tmp_path) == [0] * RANKS
    layer = moe()
    initialise(layer, 9)
    for rank in range(RANKS):
        first, parameters = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert first == rank * E // RANKS
        for name, values in parameters.items():
            whole = layer.experts.get_parameter(name)[first : first + E // RANKS]
            assert torch.equal(values, whole), name


def test_order_of_no_rows() -> None:
    order = ExpertOrder.of(torch.empty(0, dtype=torch.int64), 3)
    experts = Experts(3, D, HIDDEN, gated=True, activation="silu", biased=True)
    assert experts.hidden(experts.enter(torch.empty(0, D), order, K), order).shape == (0, HIDDEN)
    assert experts(torch.empty(0, D), order, torch.empty(0, K)).shape == (0, D)
