"""Drawing tokens: against the definition in plain Python, and against expected frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.errors import ConfigError
from rxt_dist.inference.sampler import Sampling, choose, probabilities
from rxt_dist.randomness import fold_in_tensor


def keys(count: int) -> torch.Tensor:
    return fold_in_tensor(torch.tensor(7), torch.arange(count))


def plain(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Temperature, then the k best, then the best up to and including the one that crosses p."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    order = order[: top_k or len(order)]
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if reached > top_p and top_p < 1:
            break
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 7), min_size=1, max_size=12),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.sampled_from([1e-9, 0.1037, 0.3021, 0.6131, 0.9029, 0.9971, 1.0]),
)
def test_probabilities_are_those_of_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    rows = torch.tensor([logits, logits[::-1]], dtype=torch.float64)
    found = probabilities(rows, sampling)
    for row, values in zip(found.tolist(), (logits, logits[::-1]), strict=True):
        expected = plain(values, temperature, top_k, top_p)
        assert row == pytest.approx(expected, abs=1e-12)
        assert [p == 0 for p in row] == [p == 0 for p in expected], "filtered means exactly 0"


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, kept in ((0.1, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)):
        found = probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
        assert int((found > 0).sum()) == kept, top_p


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6, top_k=3),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=1.0, top_k=5, top_p=0.7),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(sampling: Sampling) -> None:
    draws = 40_000
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -3.0]])
    expected = torch.tensor(plain(logits[0].tolist(), sampling.temperature, sampling.top_k, sampling.top_p))
    counts = choose(logits.expand(draws, -1), sampling, keys(draws)).bincount(minlength=7).double()
    assert not counts[expected == 0].any(), "a filtered token was drawn"
    deviation = (counts - draws * expected) / (draws * expected * (1 - expected)).clamp_min(1e-9).sqrt()
    assert deviation[expected > 0].abs().max() < 4.5


def test_what_is_drawn_depends_on_row_and_key_alone() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.95)
    together = choose(logits, sampling, keys(5))
    order = torch.tensor([3, 0, 4])
    assert choose(logits[order], sampling, keys(5)[order]).tolist() == together[order].tolist()
    assert len(set(choose(logits[:1].expand(99, -1), sampling, keys(99)).tolist())) > 5


def test_temperature_zero_takes_the_first_of_the_most_probable() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0], [9.0, 0.0, 0.0, 9.0]])
    for sampling in (Sampling(), Sampling(top_k=3, top_p=0.4)):
        assert choose(logits, sampling, keys(2)).tolist() == [1, 0]
        assert probabilities(logits, sampling).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_of_equally_probable_tokens_those_with_smaller_ids_are_kept() -> None:
    logits = torch.zeros(3, 5000)
    for sampling in (Sampling(temperature=1.0, top_k=7), Sampling(temperature=1.0, top_p=6.5 / 5000)):
        found = probabilities(logits, sampling)
        assert (found > 0).nonzero()[:, 1].tolist() == [*range(7)] * 3


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_ends_of_the_random_numbers_meet_no_filtered_token(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rxt_dist.inference.sampler.uniform_tensor", lambda k: torch.full(k.shape, number))
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0, 9.5, 1.0, 0.0]])
    token = choose(logits, Sampling(temperature=1.0, top_k=3), keys(1)).item()
    assert token == (2 if number == 0 else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_values_are_no_error(dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, -6e4, 5e4]], dtype=dtype)
    assert choose(logits, Sampling(temperature=1e-300), keys(1)).tolist() == [0]
    assert choose(logits, Sampling(temperature=1.0, top_p=1e-12), keys(1)).tolist() == [0]
    hidden = torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=dtype)
    assert choose(hidden.expand(50, -1), Sampling(temperature=5.0), keys(50)).tolist() == [1] * 50


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2)]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token(sampling: Sampling, bad: float) -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0], [0.0, bad, 1.0]])
    found = choose(logits, sampling, keys(2)).tolist()
    assert found[0] in (0, 1, 2)
    assert found[1] == -1


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("temperature", -0.1, "0 (greedy) or more"),
        ("temperature", math.nan, "0 (greedy) or more"),
        ("temperature", math.inf, "0 (greedy) or more"),
        ("top_k", 0, "1 or more"),
        ("top_k", -3, "1 or more"),
        ("top_p", 0.0, "more than 0, at most 1"),
        ("top_p", 1.01, "more than 0, at most 1"),
        ("top_p", math.nan, "more than 0, at most 1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float, valid: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert str(error.value) == f"{field}: found {value}; valid: {valid}"
