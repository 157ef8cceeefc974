"""Room for rows of spread experts that the host has not counted: how much, and what is computed in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed
from helpers.expert_cases import Case, model_of_rank, whole_model
from helpers.expert_work import order_of_work
from helpers.interpreter import interpret
from helpers.launch import run_function
from helpers.shared_memory import share_memory
from helpers.spread_experts import spread_experts

from rxt_dist.config import MoEConfig
from rxt_dist.kernels import triton_support
from rxt_dist.model.decoder import Decoder, DecoderOutput
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.moe import MoE
from rxt_dist.parallel import rooms
from rxt_dist.parallel.dispatch import all_travel, travelling, visits
from rxt_dist.parallel.rooms import Rooms, Trial, exact_rooms
from rxt_dist.parallel.spread_layer import SpreadDecoder

D, E, K = 16, 8, 4


class TestRooms:
    def test_the_first_pass_is_counted(self) -> None:
        known = Rooms(4)
        assert known.of((100, 0)) is None
        known.learn((100, 0), (200, 0))
        assert known.of((100, 10)) is None, "nothing is known of others"
        assert known.of((100, 0)) is not None

    def test_there_is_room_for_as_many_and_some_more(self) -> None:
        known = Rooms(6)
        known.learn((100_000, 200_000), (300_000, 500_000))
        own, others = known.of((100_000, 200_000)) or (0, 0)
        assert 300_000 * 1.05 < own < 300_000 * 1.08
        assert 500_000 * 1.05 < others < 500_000 * 1.08
        assert own % 128 == others % 128 == 0
        assert (known.of((50_000, 0)) or (0, 9))[1] == 0
        half = (known.of((50_000, 0)) or (0, 0))[0]
        assert 150_000 * 1.05 < half < 150_000 * 1.09

    def test_there_is_never_more_than_all_can_have(self) -> None:
        known = Rooms(2)
        known.learn((100, 100), (200, 199))
        assert known.of((100, 3)) == (200, 6)

    def test_it_stays_the_same_while_it_fits(self) -> None:
        known = Rooms(6)
        known.learn((10_000, 10_000), (30_000, 30_000))
        first = known.of((10_000, 10_000))
        assert first is not None
        for rows in (29_000, 31_000, 27_500, 30_000):
            known.learn((10_000, 10_000), (rows, rows))
            assert known.of((10_000, 10_000)) == first
        known.learn((10_000, 10_000), (31_500, 26_000))  # nearly full, and nearly empty
        own, others = known.of((10_000, 10_000)) or (0, 0)
        assert own > first[0]
        assert others < first[1]

    def test_passes_that_need_less_do_not_take_the_room_of_others(self) -> None:
        known, tokens = Rooms(6), (10_000, 10_000)
        for number in range(40):
            rows = 30_000 if number % 2 else 22_000
            room = known.of(tokens)
            assert number < 2 or (room is not None and room[0] >= rows), number
            known.learn(tokens, (rows, rows))
        for _ in range(60):
            known.learn(tokens, (22_000, 22_000))
        assert (known.of(tokens) or (0, 0))[0] < 22_000 / 0.85 + 1_200

    def test_what_is_computed_again_is_counted(self) -> None:
        known = Rooms(6)
        known.learn((10, 10), (30, 30))
        with exact_rooms():
            assert known.of((10, 10)) is None
        assert known.of((10, 10)) is not None


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


def pass_often(folder: Path, biased: bool, writes: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        taken = share_memory(patch, folder) if writes else []
        torch.save(passes(biased), folder / f"{dist.get_rank()}.pt")
        assert len(taken) == (2 if writes else 0), "as the passes grow"


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
@pytest.mark.parametrize(
    ("ranks", "biased", "writes"),
    [
        (2, True, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, False, False), (4, True, False), (4, False, True))
        ),
    ],
)
def test_experts_with_room_are_the_whole_layer(
    tmp_path: Path, ranks: int, biased: bool, writes: bool
) -> None:
    """Also where there is too little of it, or much more than is needed."""
    assert all_travel(E, K, ranks)
    assert run_function(ranks, pass_often, tmp_path, biased, writes) == [0] * ranks
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    grown = dict.fromkeys(range(len(LEANINGS)), 0)
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
            grown[number] += sum("rows" in thing for thing in done) - (4 + 8)
    # A product of own rows and two of those of others are done once more, where there was no room.
    for number, products in grown.items():
        assert products % 3 == 0
        assert (products > 0) == (number == 3) or number == 5


LIKINGS = (0.0, 0.0, 9.0, 9.0, -9.0)
"""For the experts of the first rank, pass by pass; of 9 all tokens choose them, of -9 none does."""


def try_passes(folder: Path) -> None:
    join_deepspeed()
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        patch.setattr(rooms, "_SPREAD", 0)  # else so few tokens have room for all their rows
        patch.setattr(rooms, "_ALIGNMENT", 1)
        compare_decoders(patch)


def compare_decoders(patch: pytest.MonkeyPatch) -> None:
    """Spread decoders and a whole one, pass by pass."""
    case, ranks, rank = Case("joint_lm", 2, 2, variant="selection bias"), 2, dist.get_rank()
    whole = whole_model(case).decoder
    spread = model_of_rank(case, whole_model(case), rank).decoder
    assert isinstance(spread, SpreadDecoder)
    both = [[part for part in one.modules() if isinstance(part, MoE)] for one in (spread, whole)]
    attempts: list[bool] = []
    plain = Decoder.forward

    def forward(self: Decoder, *arguments: Any) -> DecoderOutput:
        attempts.append(self is spread)
        return plain(self, *arguments)

    patch.setattr(Decoder, "forward", forward)
    for number, liking in enumerate(LIKINGS):
        for layer in (*both[0], *both[1]):
            bias, experts = layer.router.selection_bias, layer.config.num_experts
            assert bias is not None
            bias[: experts // 2], bias[experts // 2 :] = liking, 0.0
            layer.loads = torch.full((experts,), 5)
        attempts.clear()
        with order_of_work() as done:
            found = pass_through(spread, [rank])
        again = number > 1 and liking != LIKINGS[number - 1]
        assert sum(attempts) == 1 + again, (number, attempts)
        # Numbers are read after all products of the pass, and before them only in the first.
        products = [thing for thing in done if thing not in ("send", "wait")]
        assert products.index("read") == (len(both[0]) * 4 if number else 0), (number, products)
        patch.setattr(triton_support, "interpreted", False)  # the whole one does without, in less time
        exact = pass_through(whole, [rank])
        torch.testing.assert_close(found["hidden"], exact["hidden"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["embedding"], exact["embedding"], rtol=1e-4, atol=1e-5)
        for one, other in zip(*both, strict=True):
            assert other.loads is not None
            assert torch.equal(one.loads, other.loads)  # type: ignore[arg-type]
        everything = pass_through(whole, list(range(ranks)))
        patch.setattr(triton_support, "interpreted", True)
        for own, total in zip(found["experts"], everything["experts"], strict=True):
            part = total[rank * len(own) :][: len(own)]
            torch.testing.assert_close(own, part, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        attempts.clear()
        hidden = spread(*batch_of(rank), None).hidden
        torch.testing.assert_close(hidden, whole(*batch_of(rank), None).hidden, rtol=1e-4, atol=1e-5)
        assert attempts == [True, False]


def batch_of(rank: int) -> tuple[torch.Tensor, SequenceLayout]:
    lengths = [20 + rank, 9, 30]
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(5, 30, (sum(lengths),), generator=generator), SequenceLayout.from_lengths(lengths)


def pass_through(decoder: Decoder, ranks: list[int]) -> dict[str, Any]:
    """Hidden states of the batches of ``ranks``, and gradients of the embedding and of the first products."""
    decoder.zero_grad()
    hidden = []
    for rank in ranks:
        out = decoder(*batch_of(rank), None)
        hidden.append(out.hidden.detach())
        ((out.hidden * torch.linspace(-1, 1, out.hidden.shape[1])).sum() + out.aux_sum).backward()
    layers = [part for part in decoder.modules() if isinstance(part, MoE)]
    return {
        "hidden": torch.cat(hidden),
        "embedding": decoder.embedding.weight.grad,
        "experts": [layer.experts.w_in.grad for layer in layers],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is imported for the GPU")
def test_a_decoder_asks_at_the_end_of_a_pass(tmp_path: Path) -> None:
    """Whether there was room, and if a rank had too little, all of them make the pass once more."""
    assert run_function(2, try_passes, tmp_path) == [0, 0]


def test_many_passes_made_twice_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    trial = Trial(lambda fits: fits)
    for number in range(100):

        def attempt(number: int = number) -> None:
            trial.defer(lambda: number % 4 > 0)

        trial.run(attempt, lambda: None)
        assert len(caplog.records) == (number >= 80), number
    assert (
        caplog.records[0].getMessage().startswith("21 of the last 81 passes of the decoder were made twice")
    )


def test_who_says_no_has_all_try_again() -> None:
    said: list[bool] = []
    known, undone = Rooms(4), []

    def agree(fits: bool) -> bool:
        said.append(fits)
        return fits and len(said) != 3  # the third time another rank has too little

    trial = Trial(agree)
    known.learn((100, 0), (200, 0))
    for rows, expected in ((100, ["room"]), (399, ["room", "none"]), (100, ["room", "none"])):
        seen: list[str] = []

        def attempt(rows: int = rows, seen: list[str] = seen) -> str:
            room = known.of((100, 0))
            seen.append("none" if room is None else "room")
            if room is not None:
                assert trial.defer(lambda: rows <= room[0])
            return seen[-1]

        assert trial.run(attempt, lambda: undone.append(1)) == expected[-1]
        assert seen == expected
    assert said == [True, False, True]
    assert len(undone) == 2
    assert not trial.defer(lambda: False), "nobody would ask"
    with exact_rooms():
        assert trial.run(lambda: "counted", lambda: undone.append(1)) == "counted"
    assert len(said) == 3
