"""Kernels over the rows of a memory on a GPU: against operators, at the sizes of a small run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxt_dist.kernels import triton_support
from rxt_dist.kernels.noise import with_noise
from rxt_dist.kernels.random_triton import NORMAL, UNIFORM, with_draws
from rxt_dist.model import SequenceLayout
from rxt_dist.randomness import fold_in_tensor, normal_tensor, uniform_tensor
from rxt_dist.stages.write_losses import write_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEPTH, LANES, SLOTS, WIDTH = 12, 16, 256, 256


def random_keys(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, device="cuda")


@pytest.mark.parametrize("kind", [UNIFORM, NORMAL])
def test_draws_are_those_of_a_cpu(kind: int) -> None:
    stm = torch.randn(DEPTH, LANES, SLOTS, WIDTH, device="cuda")
    where, keys = torch.arange(LANES, device="cuda") % 3 == 0, random_keys(LANES)
    found = with_draws(stm, where, keys, kind, 0.5).cpu()
    assert torch.equal(found[:, ~where.cpu()], stm.cpu()[:, ~where.cpu()])
    lane = keys[where].cpu().view(1, -1, 1)
    rows = fold_in_tensor(lane, torch.arange(DEPTH * SLOTS).view(DEPTH, 1, SLOTS))
    if kind == UNIFORM:
        exact = uniform_tensor(fold_in_tensor(rows.unsqueeze(-1), torch.arange(WIDTH)))
    else:
        exact = normal_tensor(rows, WIDTH)
    assert (found[:, where.cpu()] - 0.5 * exact).abs().max() < 1e-5


def test_noise_is_that_of_a_cpu_and_rounded_once() -> None:
    keys = random_keys(4, 1000)
    values = torch.randn(4, 1000, WIDTH, device="cuda").bfloat16()
    found = with_noise(values, keys, 0.1).cpu()
    exact = values.cpu() + (normal_tensor(keys.cpu(), WIDTH) * 0.1).bfloat16()
    assert (found != exact).float().mean() < 0.001  # numbers at the edge between two of bf16
    assert ((found - exact).abs() <= 2**-6).all()


def test_statistics_of_normal_numbers() -> None:
    keys = random_keys(2, 4096)
    drawn = with_noise(torch.zeros(2, 4096, WIDTH, device="cuda"), keys, 1.0).double()
    count = drawn.numel()
    assert abs(drawn.mean()) < 5 / count**0.5
    assert abs(drawn.square().mean() - 1) < 5 * (2 / count) ** 0.5
    assert abs((drawn.abs() > 3).double().mean() - 0.0026998) < 5 * (0.0027 / count) ** 0.5
    for other in (drawn.roll(1, 0), drawn.roll(1, 1), drawn.roll(1, 2), drawn.flip(2)):
        assert abs((drawn * other).mean()) < 5 / count**0.5


@pytest.mark.parametrize("noisy", [False, True])
def test_losses_of_a_write(noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 300, (LANES,)).tolist()
    before = torch.randn(DEPTH, LANES, SLOTS, WIDTH, device="cuda", requires_grad=True)
    after = (before.detach() + 0.3 * torch.randn_like(before)).requires_grad_()
    arguments: dict[str, Any] = {
        "layers": torch.randn(DEPTH, sum(lengths), WIDTH, device="cuda").bfloat16(),
        "weights": torch.rand(LANES, device="cuda"),
        "factors": 1 + torch.rand(LANES, device="cuda"),
        "layout": SequenceLayout.from_lengths(lengths, "cuda"),
        "present": torch.arange(LANES, device="cuda") != 3,
        "noise": random_keys(DEPTH, sum(lengths)) if noisy else None,
        "level": 0.2 if noisy else 0.0,
    }

    def compute() -> list[torch.Tensor]:
        distance, difference = write_losses(after, before, **arguments)
        grads = torch.autograd.grad(distance + 100 * difference, (after, before))
        return [distance.detach(), difference.detach(), *grads]

    found, again = compute(), compute()
    monkeypatch.setattr(triton_support, "HAS_TRITON", False)
    for ours, same, exact in zip(found, again, compute(), strict=True):
        assert torch.equal(ours, same)
        assert (ours - exact).abs().max() <= 2e-5 * exact.abs().max()
