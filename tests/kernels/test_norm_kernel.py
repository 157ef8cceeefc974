"""The gradient of a residual branch that begins with RMSNorm, against its definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.interpreter import interpreter  # noqa: F401

from rxt_dist.kernels import norm_triton
from rxt_dist.kernels.norm import RMS_EPS, rms_norm_branch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # the interpreter cuts off instead of rounding


def by_definition(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()


def gradients(x: torch.Tensor, weight: torch.Tensor, slopes: list[torch.Tensor]) -> list[torch.Tensor]:
    """What comes out, and gradients of x and weight."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    stream, normed = rms_norm_branch(*leaves)
    assert torch.equal(stream, x)
    torch.autograd.backward([stream, normed], slopes)
    return [normed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def expected(x: torch.Tensor, weight: torch.Tensor, slopes: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    normed = by_definition(*leaves)
    torch.autograd.backward([leaves[0] * 1, normed], [slope.double() for slope in slopes])
    return [normed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def sample(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(shape[0])

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    return normal(*shape) * 3, normal(shape[-1]) + 1, [normal(*shape) for _ in range(2)]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 20), (1, 1), (130, 8), (2, 3, 64), (3, 2100), (0, 8)])
def test_gradients(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inside: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if inside:
        request.getfixturevalue("interpreter")
        launches: list[Any] = []
        launch = norm_triton.norm_backward
        monkeypatch.setattr(
            "rxt_dist.kernels.norm.norm_backward", lambda *a: launches.append(0) or launch(*a)
        )
    x, weight, slopes = sample(shape, dtype)
    found = gradients(x, weight, slopes)
    for ours, exact in zip(found, expected(x, weight, slopes), strict=True):
        assert ours.dtype == dtype
        scale = exact.abs().amax().item() if exact.numel() else 1.0
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale)
    if inside:
        assert len(launches) == bool(x.numel())


@pytest.mark.usefixtures("interpreter")
def test_many_programs_add_up_the_gradient_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_triton, "_RUN", 2)
    monkeypatch.setattr(norm_triton, "_TILE", 32)
    x, weight, slopes = sample((555, 24), torch.float32)  # more programs than are added up at once
    for ours, exact in zip(gradients(x, weight, slopes), expected(x, weight, slopes), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("interpreter")
def test_one_of_the_two_results_and_a_frozen_weight() -> None:
    x, weight, slopes = sample((9, 16), torch.float32)
    for used in (0, 1):
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        rms_norm_branch(leaf, weight)[used].backward(slopes[used])
        (exact * 1, by_definition(exact, weight.double()))[used].backward(slopes[used].double())
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    assert weight.grad is None
