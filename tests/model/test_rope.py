"""Rotary positions."""

from __future__ import annotations

import math

import pytest
import torch

from rxt_dist.model.rope import Rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjacent_pairs_turn_by_position_times_frequency(dtype: torch.dtype) -> None:
    width, base, position = 6, 100.0, 7
    x = torch.randn(1, 2, width, dtype=dtype)
    out = Rotation.at(torch.tensor([position]), width, base).apply(x)
    assert out.dtype == dtype
    for pair in range(width // 2):
        angle = position * base ** (-2 * pair / width)
        even, odd = x[0, :, 2 * pair], x[0, :, 2 * pair + 1]
        expected = torch.stack(
            (even * math.cos(angle) - odd * math.sin(angle), even * math.sin(angle) + odd * math.cos(angle)),
            -1,
        )
        torch.testing.assert_close(out[0, :, 2 * pair : 2 * pair + 2], expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(a: int, b: int) -> torch.Tensor:
        turned_q = Rotation.at(torch.tensor([a]), 16, 10000.0).apply(q)
        return (turned_q * Rotation.at(torch.tensor([b]), 16, 10000.0).apply(k)).sum()

    torch.testing.assert_close(score(5, 3), score(105, 103), rtol=1e-4, atol=1e-4)


def test_gradient_is_the_inverse_rotation() -> None:
    rotation = Rotation.at(torch.arange(4), 8, 10000.0)
    x = torch.randn(4, 3, 8, requires_grad=True)
    y = rotation.apply(x)
    y.backward(y.detach())
    torch.testing.assert_close(x.grad, x.detach())


def test_strided_heads_and_leading_dimensions() -> None:
    fused = torch.randn(4, 6, 8)
    rotation = Rotation.at(torch.arange(4), 8, 10000.0)
    torch.testing.assert_close(rotation.apply(fused[:, 1:3]), rotation.apply(fused)[:, 1:3])
    stacked = torch.stack((fused, fused * 2))
    torch.testing.assert_close(rotation.apply(stacked)[1], rotation.apply(fused) * 2)


def test_bf16_angles_are_not_rounded() -> None:
    positions = torch.tensor([1001])
    x = torch.randn(1, 1, 16)
    exact = Rotation.at(positions, 16, 10000.0).apply(x)
    half = Rotation.at(positions, 16, 10000.0).apply(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.03)
