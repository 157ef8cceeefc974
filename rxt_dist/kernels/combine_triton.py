# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows of experts back into their tokens, in one pass each way.

Shape legend: N tokens, K slots of a token, n <= N * K rows of one slot each, by expert, E experts, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rxt_dist.kernels.segments_triton import new_segments, store_segments, sum_segments

_TOKENS, _ROWS = 16, 64


def _columns(width: int) -> int:
    return 128 if width % 128 == 0 else 64


def combine_forward(
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    inverse: torch.Tensor,
    expert_of_row: torch.Tensor | None,
    copies: int,
) -> torch.Tensor:
    """Contiguous ``rows`` [n, D], n > 0, and the rest contiguous too -> [N, D]. Slots of which ``inverse``
    [N * K] is -1 have no row."""
    width, tokens = rows.shape[1], inverse.shape[0] // copies
    out = rows.new_empty(tokens, width)
    columns = _columns(width)
    blocks = (tokens + _TOKENS - 1) // _TOKENS
    _combine_forward[(blocks * ((width + columns - 1) // columns),)](
        rows, bias, weights, inverse, expert_of_row, out, tokens, WIDTH=width, COPIES=copies, TOKENS=_TOKENS,
        COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


def combine_backward(
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    order: torch.Tensor,
    expert_of_row: torch.Tensor,
    offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of rows, weights and bias from the result's, ``grad`` [N, D].

    That of the weights is wanted where there are ``rows``, that of the bias where there are ``offsets``.
    """
    count, width = order.shape[0], grad.shape[1]
    grad_rows = grad.new_empty(count, width)
    grad_weights = None
    if rows is not None:  # slots without a row are written by nobody
        partial = count != weights.numel()
        grad_weights = torch.zeros_like(weights) if partial else torch.empty_like(weights)
    segments = None
    if bias is not None and offsets is not None:
        segments = new_segments(count, _ROWS, bias)
    _combine_backward[((count + _ROWS - 1) // _ROWS,)](
        grad, rows, bias, weights, order, expert_of_row, grad_rows, grad_weights, segments, count,
        WIDTH=width, COPIES=weights.shape[1], ROWS=_ROWS, COLUMNS=_columns(width), num_warps=8,
    )  # fmt: skip
    if bias is None or offsets is None or segments is None:
        return grad_rows, grad_weights, None
    return grad_rows, grad_weights, sum_segments(segments, offsets, _ROWS, bias)


@triton.jit
def _combine_forward(
    rows,  # [count, WIDTH]
    bias,  # [experts, WIDTH] or None
    weights,  # [tokens, COPIES] or None
    inverse,  # [tokens * COPIES], -1: no row
    expert_of_row,  # [count] or None
    out,  # [tokens, WIDTH]
    tokens,
    WIDTH: tl.constexpr,
    COPIES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // CHUNKS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
    known = token < tokens
    wanted = column < WIDTH
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for copy in tl.static_range(COPIES):
        slot = token * COPIES + copy
        row = tl.load(inverse + slot, mask=known, other=-1).to(tl.int64)
        found = row >= 0
        real = found[:, None] & wanted[None, :]
        part = tl.load(rows + (row[:, None] * WIDTH + column[None, :]), mask=real, other=0.0).to(tl.float32)
        if bias is not None:
            expert = tl.load(expert_of_row + row, mask=found, other=0).to(tl.int32)
            part += tl.load(bias + (expert[:, None] * WIDTH + column[None, :]), mask=real, other=0.0).to(
                tl.float32
            )
        if weights is not None:
            part *= tl.load(weights + slot, mask=found, other=0.0)[:, None]
        total += part
    real = known[:, None] & wanted[None, :]
    tl.store(out + (token[:, None] * WIDTH + column[None, :]), total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _combine_backward(
    grad,  # [tokens, WIDTH]
    rows,  # [count, WIDTH], or None: no gradient of the weights
    bias,  # [experts, WIDTH] or None
    weights,  # [tokens, COPIES]
    order,  # [count]
    expert_of_row,  # [count]
    grad_rows,  # [count, WIDTH]
    grad_weights,  # [tokens, COPIES] or None, 0 where a slot has no row
    segments,  # fp32 [blocks + experts, WIDTH] or None
    count,
    WIDTH: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    start = block.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    known = row < count - start
    slot = tl.load(order + start + row, mask=known, other=0).to(tl.int64)
    source = (slot // COPIES) * WIDTH
    weight = tl.load(weights + slot, mask=known, other=0.0)
    if bias is not None:
        expert = tl.load(expert_of_row + start + row, mask=known, other=0).to(tl.int32)
        first = tl.load(expert_of_row + start).to(tl.int32)
        last = tl.load(expert_of_row + tl.minimum(start + ROWS, count) - 1).to(tl.int32)
    product = tl.zeros([ROWS], tl.float32)
    for at in range(0, WIDTH, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        wanted = column < WIDTH
        real = known[:, None] & wanted[None, :]
        cell = start * WIDTH + (row[:, None] * WIDTH + column[None, :])
        change = tl.load(grad + (source[:, None] + column[None, :]), mask=real, other=0.0).to(tl.float32)
        if grad_weights is not None:
            part = tl.load(rows + cell, mask=real, other=0.0).to(tl.float32)
            if bias is not None:
                part += tl.load(bias + (expert[:, None] * WIDTH + column[None, :]), mask=real, other=0.0).to(
                    tl.float32
                )
            product += tl.sum(change * part, axis=1)
        change = change * weight[:, None]
        tl.store(grad_rows + cell, change.to(grad_rows.dtype.element_ty), mask=real)
        if segments is not None:
            store_segments(segments, change, expert, first, last, block, column, WIDTH, wanted)
    if grad_weights is not None:
        tl.store(grad_weights + slot, product, mask=known)
