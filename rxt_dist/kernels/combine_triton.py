# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows of tokens to their experts, and back into the tokens, in one pass each way.

Shape legend: N tokens, K slots of a token, n <= N * K rows of one slot each, by expert, E experts, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rxt_dist.kernels.segments_triton import block_of_run, blocks_of_runs, new_segments, sum_segments

_TOKENS, _SPREAD_TOKENS, _ROWS = 16, 8, 64
_CELLS = 8192
"""Numbers of whole rows that a program has at once, at most (or one row)."""


def _columns(width: int) -> int:
    return 128 if width % 128 == 0 else 64


def combine_forward(
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    inverse: torch.Tensor,
    expert_of_row: torch.Tensor | None,
    copies: int,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contiguous ``rows`` [n, D], n > 0, and the rest contiguous too -> [N, D], added to ``base`` [N, D].
    Slots of which ``inverse`` [N * K] is -1 have no row."""
    width, tokens = rows.shape[1], inverse.shape[0] // copies
    out = rows.new_empty(tokens, width)
    columns = _columns(width)
    blocks = (tokens + _TOKENS - 1) // _TOKENS
    _combine_forward[(blocks * ((width + columns - 1) // columns),)](
        rows, bias, weights, inverse, expert_of_row, base, out, tokens, WIDTH=width, COPIES=copies,
        TOKENS=_TOKENS, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


def combine_backward(
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    bias_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of rows, weights and bias from the result's, ``grad`` [N, D].

    That of the weights is wanted where there are ``rows``.
    """
    count, width = order.shape[0], grad.shape[1]
    grad_rows = grad.new_empty(count, width)
    grad_weights = None
    if rows is not None:
        grad_weights = torch.zeros_like(weights)  # slots without a row are written by nobody
    segments = new_segments(count, _ROWS, bias) if bias is not None and bias_needs_grad else None
    columns = max(64, 1 << (int(width) - 1).bit_length())
    blocks, experts = blocks_of_runs(count, _ROWS, bias)
    _combine_backward[(blocks,)](
        grad, rows, bias, weights, order, offsets[-1:] if bias is None else offsets, grad_rows, grad_weights,
        segments, WIDTH=width, COPIES=weights.shape[1], BLOCK=_ROWS, COLUMNS=columns,
        ROWS=max(1, min(16, _CELLS // columns)), num_warps=4, **experts,
    )  # fmt: skip
    if bias is None or segments is None:
        return grad_rows, grad_weights, None
    return grad_rows, grad_weights, sum_segments(segments, offsets, _ROWS, bias)


def spread_rows(x: torch.Tensor, count: int, inverse: torch.Tensor, copies: int) -> torch.Tensor:
    """Contiguous ``x`` [N, D] at the rows of its slots: [count, D], count > 0."""
    tokens, width = x.shape
    out = x.new_empty(count, width)
    columns = _columns(width)
    blocks = (tokens + _SPREAD_TOKENS - 1) // _SPREAD_TOKENS
    _spread[(blocks * ((width + columns - 1) // columns),)](
        x,
        inverse,
        out,
        tokens,
        WIDTH=width,
        COPIES=copies,
        TOKENS=_SPREAD_TOKENS,
        COLUMNS=columns,
        num_warps=4,
    )
    return out


@triton.jit
def _combine_forward(
    rows,  # [count, WIDTH]
    bias,  # [experts, WIDTH] or None
    weights,  # [tokens, COPIES] or None
    inverse,  # [tokens * COPIES], -1: no row
    expert_of_row,  # [count] or None
    base,  # [tokens, WIDTH] or None
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
    place = token[:, None] * WIDTH + column[None, :]
    if base is not None:
        total += tl.load(base + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _combine_backward(
    grad,  # [tokens, WIDTH]
    rows,  # [count, WIDTH], or None: no gradient of the weights
    bias,  # [E, WIDTH] or None
    weights,  # [tokens, COPIES]
    order,  # [count]
    offsets,  # [E]
    grad_rows,  # [count, WIDTH]
    grad_weights,  # [tokens, COPIES] or None, 0 where a slot has no row
    segments,  # fp32 [blocks, WIDTH] or None
    WIDTH: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of BLOCK, at once
    COLUMNS: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + number - 1, mask=(number > 0) & (number < E), other=0)
    ends = tl.load(offsets + number, mask=number < E, other=0)
    expert, start, end, used = block_of_run(begins, ends, block, E, BLOCK)
    if used:
        column = tl.arange(0, COLUMNS)
        wanted = column < WIDTH
        if bias is not None:
            added = tl.load(bias + expert * WIDTH + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in tl.range(0, BLOCK, ROWS, num_stages=3):
            row = first + tl.arange(0, ROWS)
            known = row < end - start
            real = known[:, None] & wanted[None, :]
            slot = tl.load(order + start + row, mask=known, other=0).to(tl.int64)
            weight = tl.load(weights + slot, mask=known, other=0.0)
            source = (slot // COPIES) * WIDTH
            cell = start * WIDTH + (row[:, None] * WIDTH + column[None, :])
            change = tl.load(grad + (source[:, None] + column[None, :]), mask=real, other=0.0).to(tl.float32)
            if grad_weights is not None:
                part = tl.load(rows + cell, mask=real, other=0.0).to(tl.float32)
                if bias is not None:
                    part += added
                tl.store(grad_weights + slot, tl.sum(change * part, axis=1), mask=known)
            change = change * weight[:, None]
            tl.store(grad_rows + cell, change.to(grad_rows.dtype.element_ty), mask=real)
            total += change
        if segments is not None:
            tl.store(segments + block.to(tl.int64) * WIDTH + column, tl.sum(total, 0), mask=wanted)


@triton.jit
def _spread(
    x,  # [tokens, WIDTH]
    inverse,  # [tokens * COPIES], -1: no row
    out,
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
    wanted = (column < WIDTH)[None, :]
    value = tl.load(x + (token[:, None] * WIDTH + column[None, :]), mask=known[:, None] & wanted, other=0.0)
    for copy in tl.static_range(COPIES):
        row = tl.load(inverse + token * COPIES + copy, mask=known, other=-1).to(tl.int64)
        tl.store(out + (row[:, None] * WIDTH + column[None, :]), value, mask=(row >= 0)[:, None] & wanted)
