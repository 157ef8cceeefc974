"""The rotation kernels, on a CPU, against complex products."""

from __future__ import annotations

import pytest
import torch
from helpers.interpreter import interpreter  # noqa: F401

from rxt_dist.kernels.rotary_triton import rotate, rotated_heads
from rxt_dist.model.rope import Rotation

pytestmark = pytest.mark.usefixtures("interpreter")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def turned(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """fp64 ``x`` [..., N, H, d] times the phasors."""
    pairs = torch.complex(x[..., ::2], x[..., 1::2])
    out = pairs * torch.complex(rotation.cos.double(), rotation.sin.double())
    return torch.stack((out.real, out.imag), dim=-1).flatten(-2)


def compare(
    found: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    source: torch.Tensor,
    exact: torch.Tensor,
) -> None:
    """Results and gradients of random sums of them."""
    generator = torch.Generator().manual_seed(5)
    slopes = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in found]
    torch.autograd.backward(found, slopes)
    torch.autograd.backward(expected, [slope.double() for slope in slopes])
    tolerance = TOLERANCE[source.dtype]
    for ours, wanted in zip((*found, source.grad), (*expected, exact.grad), strict=True):
        assert ours.dtype == source.dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("tokens", "query_heads", "kv_heads", "width", "dtype"),
    [
        (33, 8, 8, 16, torch.bfloat16),  # more than one program
        (7, 3, 1, 6, torch.float32),
        (1, 2, 4, 32, torch.float32),
        (9, 1, 1, 2, torch.float32),
        (0, 2, 2, 4, torch.float32),
    ],
)
def test_heads_of_a_fused_projection(
    tokens: int, query_heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> None:
    rotation = Rotation.at(torch.arange(tokens) * 37, width, 1e4)
    x = torch.randn(tokens, query_heads + 2 * kv_heads, width, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    q, k, v = exact.split([query_heads, kv_heads, kv_heads], dim=1)
    found = rotated_heads(x, rotation.cos, rotation.sin, query_heads, kv_heads)
    compare(found, (turned(q, rotation), turned(k, rotation), v), x, exact)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((33, 8, 16), torch.bfloat16), ((3, 20, 2, 6), torch.float32), ((1, 1, 2), torch.float32)],
)
def test_one_tensor(shape: tuple[int, ...], halves: bool, dtype: torch.dtype) -> None:
    rotation = Rotation.at(torch.arange(shape[-3]) * 37, shape[-1], 1e4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = turned(exact, rotation)
    if halves:
        expected = torch.cat((expected[..., ::2], expected[..., 1::2]), dim=-1)
    compare((rotate(x, rotation.cos, rotation.sin, halves=halves),), (expected,), x, exact)


def test_strided_tensors_and_rounded_angles() -> None:
    rotation = Rotation.at(torch.arange(5), 8, 100.0, dtype=torch.bfloat16)
    wide = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = wide[:, 1:3].requires_grad_()
    out = rotate(x, rotation.cos, rotation.sin, halves=False)
    torch.testing.assert_close(out.double(), turned(x.detach().double(), rotation), rtol=2**-7, atol=2**-7)
    out.sum().backward()  # an expanded gradient, stride 0
    turned(exact := x.detach().double().requires_grad_(), rotation).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-7, atol=2**-7)
