"""Routing, sorting by expert and rotation at the sizes of a step; run on a CUDA machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rxt_dist.kernels.order_triton import counting_sort
from rxt_dist.kernels.rotary_triton import rotate, rotated_heads
from rxt_dist.kernels.router_triton import route
from rxt_dist.model.rope import Rotation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
EPS = 1e-9


def passes(
    function: Callable[..., tuple[torch.Tensor, ...]], x: torch.Tensor, slopes: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Results of ``function(x)``, and the gradient of those that have one."""
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    torch.autograd.backward([one for one in out if one.requires_grad], slopes)
    return [*(one.detach() for one in out), leaf.grad]


def region(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """``function`` amid others, in a compiled region."""
    torch.compiler.reset()
    return torch.compile(lambda x: tuple(one * 1 for one in function(x * 1)), dynamic=True, fullgraph=True)


def assert_near(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all()
    assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "count", "top_k"), [(65_537, 36, 6), (9_001, 384, 10), (1, 512, 16)])
def test_route(tokens: int, count: int, top_k: int, biased: bool) -> None:
    torch.manual_seed(0)
    columns = -(-count // 8) * 8
    logits = torch.randn(tokens, columns, device=CUDA).mul(2).bfloat16()
    bias = torch.randn(count, device=CUDA) * 0.02 if biased else None
    slopes = [torch.randn(tokens, top_k, device=CUDA), torch.randn(tokens, device=CUDA)]

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return route(x, bias, count, top_k, EPS)

    weights, experts, mass, grad = found = passes(ours, logits, slopes)
    exact = logits[:, :count].double().requires_grad_()
    probabilities = exact.softmax(dim=1)
    scores = probabilities.detach() if bias is None else probabilities.detach() + bias
    best = scores.topk(top_k, dim=1).values
    torch.testing.assert_close(scores.gather(1, experts), best, rtol=1e-6, atol=1e-7)
    assert (experts.sort(dim=1).values.diff(dim=1) > 0).all()
    top = probabilities.gather(1, experts)
    wanted_mass = top.sum(dim=1)
    wanted_weights = top / (wanted_mass[:, None] + EPS)
    torch.autograd.backward([wanted_weights, wanted_mass], [slope.double() for slope in slopes])
    assert_near(weights, wanted_weights, 1e-5)
    assert_near(mass, wanted_mass, 1e-5)
    assert_near(grad[:, :count], exact.grad, 2**-8)
    assert not grad[:, count:].any()
    for again in (passes(ours, logits, slopes), passes(region(ours), logits, slopes)):
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_experts_of_wild_logits_are_distinct_and_in_range() -> None:
    wild = torch.randn(1000, 36, device=CUDA).bfloat16()
    wild[::3, ::2], wild[1::3, 5], wild[2::9] = torch.nan, torch.inf, -torch.inf
    experts = route(wild, None, 36, 36, EPS)[1]
    assert torch.equal(experts.sort(dim=1).values, torch.arange(36, device=CUDA).expand(1000, 36))


@pytest.mark.parametrize(("rows", "count"), [(393_217, 36), (655_360, 384), (1, 3), (0, 3)])
def test_counting_sort(rows: int, count: int) -> None:
    torch.manual_seed(0)
    keys = torch.randint(0, count, (rows,), device=CUDA)
    keys[keys % 5 == 2] = count - 1
    torch.compiler.reset()
    sort = torch.compile(counting_sort, dynamic=True, fullgraph=True)
    for order, inverse, ordered, ends, total in (counting_sort(keys, count), sort(keys, count)):
        expected, places = torch.sort(keys, stable=True)
        assert torch.equal(ordered, expected)
        assert torch.equal(order, places)
        assert total.tolist() == [rows]
        assert torch.equal(inverse[order], torch.arange(rows, device=CUDA))
        assert torch.equal(ends, torch.bincount(keys, minlength=count).cumsum(0).to(torch.int32))


@pytest.mark.parametrize(
    ("tokens", "query_heads", "kv_heads", "width"), [(65_537, 8, 8, 16), (9_001, 8, 4, 32), (777, 6, 3, 12)]
)
def test_rotated_heads(tokens: int, query_heads: int, kv_heads: int, width: int) -> None:
    torch.manual_seed(0)
    rotation = Rotation.at(torch.arange(tokens, device=CUDA) % 4096, width, 1e4)
    x = torch.randn(tokens, query_heads + 2 * kv_heads, width, device=CUDA).bfloat16()
    sections = [query_heads, kv_heads, kv_heads]
    slopes = list(torch.randn_like(x).split(sections, dim=1))  # strided, as no attention gives them

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rotated_heads(x, rotation.cos, rotation.sin, query_heads, kv_heads)

    def plain(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        double = Rotation(rotation.cos.double(), rotation.sin.double())
        q, k, v = x.split(sections, dim=1)
        return double.apply(q), double.apply(k), v

    found = passes(ours, x, slopes)
    for one, exact in zip(found, passes(plain, x.double(), [s.double() for s in slopes]), strict=True):
        assert_near(one, exact, 2**-8)
    for again in (passes(ours, x, slopes), passes(region(ours), x, slopes)):
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_one_tensor_is_rotated(layout: str) -> None:
    torch.manual_seed(0)
    rotation = Rotation.at(torch.arange(3001, device=CUDA), 16, 1e4, layout=layout)
    x, slope = (torch.randn(12, 3001, 8, 16, device=CUDA).bfloat16() for _ in range(2))

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (rotate(x, rotation.cos, rotation.sin, halves=layout == "halves"),)

    def plain(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (Rotation(rotation.cos.double(), rotation.sin.double(), layout).apply_one_sided(x),)

    found = passes(ours, x, [slope])
    for one, exact in zip(found, passes(plain, x.double(), [slope.double()]), strict=True):
        assert_near(one, exact, 2**-8)
    for again in (passes(ours, x, [slope]), passes(region(ours), x, [slope])):
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
