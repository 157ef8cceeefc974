"""RMSNorm, row permutations and grouped products against their definitions."""

from __future__ import annotations

import pytest
import torch

import rxt_dist.kernels.grouped_gemm as grouped_gemm
from rxt_dist.kernels.grouped_gemm import add_group_bias, grouped_linear
from rxt_dist.kernels.norm import RMS_EPS, rms_norm
from rxt_dist.kernels.permute import add_permuted, repeat_permuted, take_rows


def plain_rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS)


@pytest.mark.parametrize("shape", [(7, 16), (3, 4, 8), (0, 16), (1, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, expected = rms_norm(x, weight), plain_rms(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    factor = torch.randn(shape)
    (out * factor).sum().backward()
    (expected * factor).sum().backward()
    for ours, theirs in zip((x, weight), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_a_strided_view_and_a_frozen_weight() -> None:
    base = torch.randn(5, 3, 8, requires_grad=True)
    weight = torch.rand(8)
    rms_norm(base[:, 1:], weight).pow(2).sum().backward()
    ours, base.grad = base.grad, None
    plain_rms(base[:, 1:], weight).pow(2).sum().backward()
    torch.testing.assert_close(ours, base.grad)


def test_rms_norm_epsilon_is_that_of_fp32_in_every_dtype() -> None:
    x = torch.full((1, 8), 1e-4, dtype=torch.bfloat16)
    out = rms_norm(x, torch.ones(8, dtype=torch.bfloat16))
    expected = plain_rms(x.float(), torch.ones(8))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", [[3, 0, 4], [2], []])
def test_rows_are_taken(rows: list[int]) -> None:
    torch.manual_seed(0)
    x, chosen = torch.randn(5, 4, requires_grad=True), torch.tensor(rows, dtype=torch.int64)
    factor = torch.randn(len(rows), 4)
    found = take_rows(x, chosen)
    assert torch.equal(found, x[chosen])
    (found * factor).sum().backward()
    ours, x.grad = x.grad, None
    (x[chosen] * factor).sum().backward()
    assert torch.equal(ours, x.grad)


def test_permutations_and_their_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)
    order = torch.randperm(15)
    inverse = order.argsort()
    factor = torch.randn(15, 4)
    rows = repeat_permuted(x, order, inverse, 3)
    assert torch.equal(rows, x.repeat_interleave(3, 0)[order])
    assert torch.equal(add_permuted(rows, order, inverse, 1), x.repeat_interleave(3, 0))
    (rows * factor).sum().backward()
    ours, x.grad = x.grad, None
    (x.repeat_interleave(3, 0)[order] * factor).sum().backward()
    torch.testing.assert_close(ours, x.grad)


def by_loop(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = x.split(counts)
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 10], [10, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize(("width", "out_width"), [(8, 12), (6, 5)])  # the second does not fit grouped_mm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_linear(counts: list[int], width: int, out_width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), width).to(dtype).requires_grad_()
    weight = torch.randn(4, out_width, width).to(dtype).requires_grad_()
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    out = grouped_linear(x, weight, offsets)
    assert out.shape == (sum(counts), out_width)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, by_loop(x, weight, counts), **tolerance)
    out.sum().backward()  # an expanded gradient, stride 0
    ours = [x.grad, weight.grad]
    x.grad = weight.grad = None
    by_loop(x, weight, counts).sum().backward()
    for left, right in zip(ours, (x.grad, weight.grad), strict=True):
        assert left is not None
        torch.testing.assert_close(left, right, **tolerance)


def test_grouped_linear_without_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(6, 8), torch.randn(2, 4, 8)
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    native = grouped_linear(x, weight, offsets)
    monkeypatch.setattr(grouped_gemm, "_fits_grouped_mm", lambda dtype, *sizes: False)
    torch.testing.assert_close(grouped_linear(x, weight, offsets), native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 24, 5])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 4], [0, 0, 0, 0], [700, 0, 1, 300]])
def test_group_bias(counts: list[int], width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    group_of_row = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = torch.randn(sum(counts), width, dtype=dtype, requires_grad=True)
    bias = torch.randn(4, width, dtype=dtype, requires_grad=True)
    factor = torch.randn(sum(counts), width, dtype=dtype)
    out = add_group_bias(x, bias, offsets, group_of_row)
    torch.testing.assert_close(out, x + bias[group_of_row])
    (out * factor).sum().backward()
    expected = torch.zeros(4, width, dtype=torch.float64).index_add_(0, group_of_row, factor.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(bias.grad.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, factor)
