"""The gradient of a residual branch at the sizes of a step; run on a CUDA machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rxt_dist.kernels.norm import RMS_EPS, rms_norm_branch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
Branch = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def by_definition(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 1, weight * x / (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()


def amid_others(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stream, normed = rms_norm_branch(x * 1, weight)
    return stream * 1, normed * 1


def passes(
    branch: Branch, x: torch.Tensor, weight: torch.Tensor, slopes: list[torch.Tensor]
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    out = branch(*leaves)
    torch.autograd.backward(out, slopes)
    return [*(one.detach() for one in out), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width"), [(65_537, 256), (4_096, 512), (1, 96), (129, 4096), (100_001, 24)]
)
def test_gradients(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, *slopes = (torch.randn(rows, width, device=CUDA).to(dtype) for _ in range(3))
    weight = (torch.randn(width, device=CUDA) + 1).to(dtype)
    found = passes(rms_norm_branch, x, weight, slopes)
    exact = passes(by_definition, x.double(), weight.double(), [slope.double() for slope in slopes])
    assert len(found) == 4
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        limit = (2**-7 if dtype == torch.bfloat16 else 1e-5) * wanted.abs().max()
        assert (ours.double() - wanted).abs().max() <= limit
    torch.compiler.reset()
    region = torch.compile(amid_others, dynamic=True, fullgraph=True)
    again = passes(rms_norm_branch, x, weight, slopes)
    compiled = passes(region, x, weight, slopes)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for one, other in zip(found, compiled, strict=True):
        assert (one.double() - other.double()).abs().max() <= 2**-7 * one.abs().max()
