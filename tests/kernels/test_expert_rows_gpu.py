"""Kernels of experts' rows on a GPU, in sizes of models, against fp64; run on a CUDA machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rxt_dist.kernels.activation import Activation, activate
from rxt_dist.model.moe import ExpertOrder, Experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TOLERANCE = 0.02
"""Of the largest value: the roundings of products to bf16, and of their gradients."""
EXPERTS = 36


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def choices(tokens: int, copies: int) -> torch.Tensor:
    """Experts of tokens [N, K]: two get most of them, two none."""
    favour = torch.linspace(0, 3, EXPERTS, device=CUDA)
    favour[-2:] += 3
    favour[[0, 17]] = -float("inf")
    noise = -torch.empty(tokens, EXPERTS, device=CUDA).exponential_().log()
    return (favour + noise).topk(copies).indices


def make(
    width: int, hidden: int, *, gated: bool, activation: Activation, biased: bool, count: int = EXPERTS
) -> Experts:
    experts = Experts(count, width, hidden, gated=gated, activation=activation, biased=biased).to(CUDA)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5 if parameter.ndim == 3 else 1.0)
    return experts.bfloat16()


def run(
    experts: Experts, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor | ExpertOrder
) -> list[torch.Tensor]:
    """The result and all gradients."""
    inputs = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    order = chosen if isinstance(chosen, ExpertOrder) else ExpertOrder.of(chosen, EXPERTS)
    out = experts(inputs[0], order, inputs[1])
    factor = torch.linspace(-1, 1, out.numel(), device=CUDA).view(out.shape).bfloat16()
    gradients = torch.autograd.grad(out, [*inputs, *experts.parameters()], factor.to(out.dtype))
    return [out.detach(), *gradients]


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.shape == exact.shape
    assert torch.isfinite(found).all()
    assert (found.double() - exact).abs().max() <= TOLERANCE * exact.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("width", "hidden", "copies", "gated", "activation", "biased"),
    [
        (256, 384, 6, True, "silu", True),
        (512, 192, 10, True, "silu", False),
        (64, 88, 3, True, "gelu", True),
        (128, 104, 1, False, "silu", True),
    ],
)
def test_experts(
    width: int, hidden: int, copies: int, gated: bool, activation: Activation, biased: bool, compiled: bool
) -> None:
    experts = make(width, hidden, gated=gated, activation=activation, biased=biased)
    exact = make(width, hidden, gated=gated, activation=activation, biased=biased).double()
    with torch.no_grad():
        for ours, theirs in zip(experts.parameters(), exact.parameters(), strict=True):
            theirs.copy_(ours)
    if compiled:
        experts.compile(dynamic=True, fullgraph=True)
    for tokens in (3001, 777):
        x = torch.randn(tokens, width, device=CUDA).bfloat16()
        weights, chosen = torch.rand(tokens, copies, device=CUDA), choices(tokens, copies)
        found = run(experts, x, weights, chosen)
        for left, right in zip(found, run(exact, x.double(), weights.double(), chosen), strict=True):
            assert_near(left, right)
        for gradient in found[3:]:
            assert not gradient[[0, 17]].any()
        for left, right in zip(found, run(experts, x, weights, chosen), strict=True):
            assert torch.equal(left, right)  # whatever the order in which programs ran


@pytest.mark.parametrize("compiled", [False, True])
def test_some_experts(compiled: bool) -> None:
    """What ranks make of tokens of which other experts are elsewhere, together what all make of them."""
    width, copies, part = 256, 6, EXPERTS // 2
    experts, exact = (make(width, 384, gated=True, activation="silu", biased=True) for _ in range(2))
    exact.double()
    with torch.no_grad():
        for ours, theirs in zip(experts.parameters(), exact.parameters(), strict=True):
            theirs.copy_(ours)
    halves = [make(width, 384, gated=True, activation="silu", biased=True, count=part) for _ in range(2)]
    for number, half in enumerate(halves):
        with torch.no_grad():
            for ours, theirs in zip(half.parameters(), experts.parameters(), strict=True):
                ours.copy_(theirs[number * part :][:part])
        if compiled:
            half.compile(dynamic=True, fullgraph=True)
    for tokens in (3001, 777):
        x, weights = (
            torch.randn(tokens, width, device=CUDA).bfloat16(),
            torch.rand(tokens, copies, device=CUDA),
        )
        chosen = choices(tokens, copies)
        chosen[tokens // 2 :] %= part  # nothing of the second half is visited by the second tokens
        total, *gradients = run(exact, x.double(), weights.double(), chosen)
        found = []
        for number, half in enumerate(halves):
            held = range(number * part, (number + 1) * part)
            order = ExpertOrder.of_some(chosen, held).first(int(((chosen // part) == number).sum()))
            found.append(run(half, x, weights, order))
            for left, right in zip(found[-1], run(half, x, weights, order), strict=True):
                assert torch.equal(left, right)
            assert not found[-1][2][(chosen // part) != number].any()
        assert_near(found[0][0] + found[1][0], total)
        for left, right, both in zip(found[0][1:3], found[1][1:3], gradients[:2], strict=True):
            assert_near(left + right, both)
        for left, right, both in zip(found[0][3:], found[1][3:], gradients[2:], strict=True):
            assert_near(torch.cat([left, right]), both)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("width", "activation"), [(768, "silu"), (1536, "gelu"), (100, "relu")])
def test_dense_activation(width: int, activation: Activation, compiled: bool) -> None:
    hidden = torch.randn(1234, 2 * width, device=CUDA).bfloat16().requires_grad_()
    factor = torch.randn(1234, width, device=CUDA).bfloat16()
    function = torch.compile(activate, dynamic=True, fullgraph=True) if compiled else activate
    out = function(hidden, activation, True)
    (gradient,) = torch.autograd.grad(out, hidden, factor)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = activate(exact_hidden, activation, True)
    (exact_gradient,) = torch.autograd.grad(exact, exact_hidden, factor.double())
    for found, right in ((out, exact), (gradient, exact_gradient)):
        torch.testing.assert_close(found.double(), right, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    experts = make(64, 32, gated=True, activation="silu", biased=True)
    x, weights = torch.randn(tokens, 64, device=CUDA).bfloat16(), torch.rand(tokens, 2, device=CUDA)
    out, *gradients = run(experts, x, weights, choices(tokens, 2))
    assert out.shape == (tokens, 64)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all(bool(gradient.any()) == (tokens > 0) for gradient in gradients[2:])


def test_the_host_never_waits() -> None:
    experts = make(64, 32, gated=True, activation="silu", biased=True)
    x, weights = torch.randn(300, 64, device=CUDA).bfloat16(), torch.rand(300, 2, device=CUDA)
    chosen = choices(300, 2)
    run(experts, x, weights, chosen)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(experts, x, weights, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
