# ruff: noqa: N803 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The gradient of RMSNorm and of the residual stream beside it, in one pass over the rows.

Shape legend: N rows, D width, P programs of RUN rows; T rows that a program holds at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST = 4096
"""Largest D: a program holds whole rows, and two more turns in shared memory (98 KB of fp32)."""
_RUN, _TILE = 128, 2048


def norm_backward(
    grad: torch.Tensor, grad_x: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of ``x`` [N, D], to which ``grad_x`` is added, and if ``wanted`` of ``weight`` [D].

    All tensors are contiguous, ``grad`` [N, D] is the gradient of the normed rows.
    """
    rows, width = x.shape
    out = torch.empty_like(x)
    programs = max(1, (rows + _RUN - 1) // _RUN)
    parts = x.new_empty(programs, width, dtype=torch.float32) if wanted else None
    padded = 1 << (width - 1).bit_length()
    _norm_backward[(programs,)](
        grad, grad_x, x, weight, out, parts, rows, EPS=eps, D=width, COLUMNS=padded, RUN=_RUN,
        T=min(_RUN, max(1, _TILE // padded)), num_warps=4 if padded <= _TILE else 8,
    )  # fmt: skip
    if parts is None:
        return out, None
    grad_weight = torch.empty_like(weight)
    columns = 8
    _sum_parts[((width + columns - 1) // columns,)](
        parts, grad_weight, programs, D=width, PARTS=256, COLUMNS=columns, num_warps=4
    )
    return out, grad_weight


@triton.jit
def _norm_backward(
    grad,
    grad_x,
    x,
    weight,
    out,
    parts,  # fp32 [programs, D] or None
    rows,
    EPS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    T: tl.constexpr,
):
    """With s = 1 / sqrt(mean(x²) + eps) and h = weight * grad: dL/dx = s (h - x s² mean(h x))."""
    column = tl.arange(0, COLUMNS)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([T, COLUMNS], tl.float32)
    start = tl.program_id(0).to(tl.int64) * RUN
    # Fetched two turns ahead: the three tensors of a turn would else be waited for one after the other.
    for step in tl.range(RUN // T, num_stages=3):
        row = start + step * T + tl.arange(0, T)
        real = (row < rows)[:, None] & inside[None, :]
        place = row[:, None] * D + column[None, :]
        value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
        change = tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
        beside = tl.load(grad_x + place, mask=real, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + EPS)
        normed = value * inverse[:, None]
        if parts is not None:
            total += change * normed
        change *= scale
        mean = tl.sum(change * normed, 1) / D
        found = (change - normed * mean[:, None]) * inverse[:, None] + beside
        tl.store(out + place, found.to(out.dtype.element_ty), mask=real)
    if parts is not None:
        tl.store(parts + tl.program_id(0) * D + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _sum_parts(parts, sums, programs, D: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    first = 0
    while first < programs:
        part = first + tl.arange(0, PARTS)
        real = (part < programs)[:, None] & (column < D)[None, :]
        total += tl.load(parts + part[:, None] * D + column[None, :], mask=real, other=0.0)
        first += PARTS
    tl.store(sums + column, tl.sum(total, 0).to(sums.dtype.element_ty), mask=column < D)
