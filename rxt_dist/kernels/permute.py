"""Selections of rows whose backward needs no sorting and no atomic additions, and is deterministic.

Shape legend: N rows, K copies of each row.
"""

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels.combine_triton import combine_forward, spread_rows


def permute_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``x[order]`` for a permutation ``order`` int64 [N] of the rows of ``x`` [N, ...], given its inverse."""
    out: torch.Tensor = _RepeatPermuted.apply(x, order, inverse, 1)  # type: ignore[no-untyped-call]
    return out


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


def place_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``x`` [n, ...] where it came from: row i is row ``order[i]`` of the result [N, ...], the others are 0.

    ``order`` and ``inverse`` as those of :func:`repeat_permuted`, of one copy.
    """
    out: torch.Tensor = _PlaceRows.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _RepeatPermuted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies, ctx.count = copies, x.shape[0]
        if x.ndim == 2 and order.shape[0] and uses_triton(x):
            return spread_rows(x.contiguous(), order.shape[0], inverse, copies)
        source = order if copies == 1 else torch.div(order, copies, rounding_mode="floor")
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0]
        if ctx.copies > 1 and grad.ndim == 2 and grad.shape[0] and uses_triton(grad):
            return combine_forward(grad.contiguous(), None, None, inverse, None, ctx.copies), None, None, None
        grad = _rows_or_zeros(grad, inverse)
        if ctx.copies > 1:
            grad = grad.view(ctx.count, ctx.copies, *grad.shape[1:]).sum(1)
        return grad, None, None, None


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return _rows_or_zeros(x, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None


def _rows_or_zeros(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x[rows]``, with zeros where a number is -1."""
    if not x.shape[0]:
        return x.new_zeros(rows.shape[0], *x.shape[1:])
    missing = (rows < 0).view(-1, *[1] * (x.ndim - 1))
    return x.index_select(0, rows.clamp_min(0)).masked_fill_(missing, 0)


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
