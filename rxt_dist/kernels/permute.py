"""Selections of rows whose backward needs no sorting and no atomic additions, and is deterministic.

Shape legend: N rows, K copies of each row.
"""

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels.combine_triton import combine_forward, spread_rows


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x[rows]`` for distinct ``rows`` int64 [n] of ``x`` [N, ...]: [n, ...]."""
    out: torch.Tensor = _TakeRows.apply(x, rows)  # type: ignore[no-untyped-call]
    return out


def repeat_permuted(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    """``x.repeat_interleave(copies, 0)[order]`` without the intermediate.

    Args:
        x: [N, ...]; order: int64 [n], distinct numbers from 0 to N * copies - 1.
        inverse: int64 [N * copies], where ``order`` has each of them; -1: nowhere.

    Returns:
        [n, ...].
    """
    out: torch.Tensor = _RepeatPermuted.apply(x, order, inverse, copies)  # type: ignore[no-untyped-call]
    return out


def add_permuted(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    """The way back of :func:`repeat_permuted`, and its gradient: rows where they came from, copies added up.

    ``x`` [n, ...], the others as there -> [N, ...]: row i counts to row ``order[i] // copies``. The copies of
    a row are added in their order, in fp32 or wider.
    """
    out: torch.Tensor = _AddPermuted.apply(x, order, inverse, copies)  # type: ignore[no-untyped-call]
    return out


class _RepeatPermuted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return copy_rows(x, order, inverse, copies)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return add_rows(grads[0], inverse, ctx.copies), None, None, None


class _AddPermuted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return add_rows(x, inverse, copies)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return _repeat(grads[0], order, ctx.copies), None, None, None


def copy_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    """Of :func:`repeat_permuted`, without a gradient. Rows that ``inverse`` does not know are undefined."""
    if x.ndim == 2 and order.shape[0] and uses_triton(x):
        return spread_rows(x.contiguous(), order.shape[0], inverse, copies)
    return _repeat(x, order, copies)


def _repeat(x: torch.Tensor, order: torch.Tensor, copies: int) -> torch.Tensor:
    source = order if copies == 1 else torch.div(order, copies, rounding_mode="floor")
    return x.index_select(0, source)


def add_rows(x: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    """Of :func:`add_permuted`, without a gradient."""
    if x.ndim == 2 and x.shape[0] and uses_triton(x):
        return combine_forward(x.contiguous(), None, None, inverse, None, copies)
    return _sums(x, inverse, copies)


def _sums(x: torch.Tensor, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    if not x.shape[0]:
        return x.new_zeros(inverse.shape[0] // copies, *x.shape[1:])
    missing = (inverse < 0).view(-1, *[1] * (x.ndim - 1))
    # Not in place: compiled by PyTorch 2.11, what a function changes and returns gets no gradient.
    rows = x.index_select(0, inverse.clamp_min(0)).masked_fill(missing, 0)
    if copies == 1:
        return rows
    return rows.view(rows.shape[0] // copies, copies, *rows.shape[1:]).sum(1)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy_(0, rows, grad), None
