"""Room for rows of spread experts that the host has not counted: how much, and what is computed in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.expert_work import order_of_work
from helpers.interpreter import interpret
from helpers.launch import run_function
from helpers.spread_experts import spread_experts

from rxt_dist.config import MoEConfig
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.dispatch import all_travel, travelling, visits
from rxt_dist.parallel.rooms import Rooms, exact_rooms

D, E, K = 16, 8, 4


class TestRooms:
    def test_the_first_pass_is_counted(self) -> None:
        rooms = Rooms(4)
        assert rooms.of((100, 0)) is None
        rooms.learn((100, 0), (200, 0))
        assert rooms.of((100, 10)) is None, "nothing is known of others"
        assert rooms.of((100, 0)) is not None

    def test_there_is_room_for_as_many_and_some_more(self) -> None:
        rooms = Rooms(6)
        rooms.learn((100_000, 200_000), (300_000, 500_000))
        own, others = rooms.of((100_000, 200_000)) or (0, 0)
        assert 300_000 * 1.05 < own < 300_000 * 1.08
        assert 500_000 * 1.05 < others < 500_000 * 1.08
        assert own % 128 == others % 128 == 0
        assert (rooms.of((50_000, 0)) or (0, 9))[1] == 0
        half = (rooms.of((50_000, 0)) or (0, 0))[0]
        assert 150_000 * 1.05 < half < 150_000 * 1.09

    def test_there_is_never_more_than_all_can_have(self) -> None:
        rooms = Rooms(2)
        rooms.learn((100, 100), (200, 199))
        assert rooms.of((100, 3)) == (200, 6)

    def test_it_stays_the_same_while_it_fits(self) -> None:
        rooms = Rooms(6)
        rooms.learn((10_000, 10_000), (30_000, 30_000))
        first = rooms.of((10_000, 10_000))
        assert first is not None
        for rows in (29_000, 31_000, 27_500, 30_000):
            rooms.learn((10_000, 10_000), (rows, rows))
            assert rooms.of((10_000, 10_000)) == first
        rooms.learn((10_000, 10_000), (31_500, 26_000))  # nearly full, and nearly empty
        own, others = rooms.of((10_000, 10_000)) or (0, 0)
        assert own > first[0]
        assert others < first[1]

    def test_what_is_computed_again_is_counted(self) -> None:
        rooms = Rooms(6)
        rooms.learn((10, 10), (30, 30))
        with exact_rooms():
            assert rooms.of((10, 10)) is None
        assert rooms.of((10, 10)) is not None


def test_who_travels() -> None:
    """Against counting all choices of four among eight."""
    chosen = list(torch.combinations(torch.arange(E), K))
    for ranks in (1, 2, 4, 8):
        here = sum(bool((one < E // ranks).any()) for one in chosen) / len(chosen)
        assert visits(E, K, ranks) == pytest.approx(here)
        assert all_travel(E, K, ranks) == (here > 0.75)
        assert travelling(E, K, ranks) == pytest.approx(1 if here > 0.75 else here)
    assert all_travel(36, 6, 4)
    assert not all_travel(36, 6, 6)
    assert not all_travel(384, 10, 8)


def moe(towards_first: float, biased: bool) -> MoE:
    config = MoEConfig(num_experts=E, top_k=K, bias="local" if biased else "off")
    layer = MoE(config, D, 2 * D, gated=True, activation="silu")
    initialise(layer, 1)
    with torch.no_grad():
        layer.router.proj.weight[: E // 2] += towards_first  # rows are positive
    return layer


def rows_of(rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.rand(60 + 7 * rank + 5 * number, D, generator=generator)


def gradients(layer: MoE, x: torch.Tensor) -> dict[str, Any]:
    x.requires_grad_()
    layer.zero_grad()
    out, _ = layer(x)
    (out * torch.arange(D)).sum().backward()
    experts = {name: p.grad for name, p in layer.experts.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "router": layer.router.proj.weight.grad, "experts": experts}


LEANINGS = (0.0, 0.0, 0.01, 1.0, 1.0, -1.0)
"""Towards the experts of the first rank, pass by pass: a bit, entirely, and away from them."""


def pass_often(folder: Path, biased: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        torch.save(passes(biased), folder / f"{dist.get_rank()}.pt")


def passes(biased: bool) -> list[tuple[dict[str, Any], list[str]]]:
    """Results and gradients of this rank, and what was done in what order."""
    layer, rank = moe(0.0, biased), dist.get_rank()
    spread_experts(layer)
    whole = {name: one.detach().clone() for name, one in layer.state_dict().items()}
    found = []
    for number, leaning in enumerate(LEANINGS):
        layer.load_state_dict(whole)
        layer.router.load_state_dict(moe(leaning, biased).router.state_dict())
        with order_of_work() as done:
            one = gradients(layer, rows_of(rank, number))
        found.append((one, done))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is imported for the GPU")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_with_room_are_the_whole_layer(tmp_path: Path, biased: bool, ranks: int) -> None:
    """Also where there is too little of it, or much more than is needed."""
    assert all_travel(E, K, ranks)
    assert run_function(ranks, pass_often, tmp_path, biased) == [0] * ranks
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    grown = 0
    for number, leaning in enumerate(LEANINGS):
        inputs = [rows_of(rank, number) for rank in range(ranks)]
        whole = gradients(moe(leaning, biased), torch.cat(inputs))
        parts = [found[rank][number][0] for rank in range(ranks)]
        torch.testing.assert_close(torch.cat([one["out"] for one in parts]), whole["out"])
        torch.testing.assert_close(torch.cat([one["x"] for one in parts]), whole["x"])
        router = sum(one["router"] for one in parts)
        torch.testing.assert_close(router, whole["router"], rtol=1e-4, atol=1e-4)
        for name, gradient in whole["experts"].items():
            spread = torch.cat([one["experts"][name] for one in parts])
            torch.testing.assert_close(spread, gradient, rtol=1e-4, atol=1e-4)
        for rank in range(ranks):
            done = found[rank][number][1]
            products = [thing for thing in done if thing not in ("send", "wait")]
            # Numbers are read after all products but one, and before them only in the first pass.
            assert products.index("read") == (0 if number == 0 else 3)
            grown += sum("rows" in thing for thing in done) - (4 + 8)
    # A product of own rows and two of those of others are done once more, where there was no room.
    assert grown == 3 * ranks
