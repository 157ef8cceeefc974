# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Activations of rows in one pass each way: the bias of a row's expert is added on the way, never stored.

Shape legend: n rows, E experts, F width of the result, W width of the hidden rows: F, or 2F where gated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rxt_dist.kernels.segments_triton import new_segments, store_segments, sum_segments

_FORWARD_ROWS, _BACKWARD_ROWS = 32, 64


def _columns(width: int) -> int:
    return 128 if width % 128 == 0 else 64


def activate_forward(
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    expert_of_row: torch.Tensor | None,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """Contiguous ``hidden`` [n, W], n > 0, contiguous ``bias`` [E, W] -> [n, F]."""
    rows, hidden_width = hidden.shape
    width = hidden_width // 2 if gated else hidden_width
    out = hidden.new_empty(rows, width)
    columns = _columns(width)
    blocks = (rows + _FORWARD_ROWS - 1) // _FORWARD_ROWS
    _activate_forward[(blocks * ((width + columns - 1) // columns),)](
        hidden, bias, expert_of_row, out, rows, WIDTH=width, GATED=gated, ACTIVATION=activation,
        ROWS=_FORWARD_ROWS, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


def activate_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    expert_of_row: torch.Tensor | None,
    offsets: torch.Tensor | None,
    activation: str,
    gated: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of ``hidden`` and of ``bias``, which none is wanted of without ``offsets``."""
    rows, width = grad.shape
    grad_hidden = torch.empty_like(hidden)
    segments = None
    if bias is not None and offsets is not None:
        segments = new_segments(rows, _BACKWARD_ROWS, bias)
    columns = _columns(width)
    blocks = (rows + _BACKWARD_ROWS - 1) // _BACKWARD_ROWS
    _activate_backward[(blocks * ((width + columns - 1) // columns),)](
        grad, hidden, bias, expert_of_row, grad_hidden, segments, rows, WIDTH=width, GATED=gated,
        ACTIVATION=activation, ROWS=_BACKWARD_ROWS, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    if bias is None or offsets is None or segments is None:
        return grad_hidden, None
    return grad_hidden, sum_segments(segments, offsets, _BACKWARD_ROWS, bias)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN
    return y


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        tl.static_assert(ACTIVATION == "relu")
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    return slope


@triton.jit
def _activate_forward(
    hidden,  # [rows, HIDDEN]
    bias,  # [experts, HIDDEN] or None
    expert_of_row,  # [rows] or None
    out,  # [rows, WIDTH]
    rows,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    HIDDEN: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    CHUNKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    start = (tl.program_id(0) // CHUNKS).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
    known = row < rows - start
    real = known[:, None] & (column < WIDTH)[None, :]
    at = hidden + start * HIDDEN + (row[:, None] * HIDDEN + column[None, :])
    value = tl.load(at, mask=real, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(at + WIDTH, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        expert = tl.load(expert_of_row + start + row, mask=known, other=0).to(tl.int32)
        bias_at = bias + (expert[:, None] * HIDDEN + column[None, :])
        value += tl.load(bias_at, mask=real, other=0.0).to(tl.float32)
        if GATED:
            gate += tl.load(bias_at + WIDTH, mask=real, other=0.0).to(tl.float32)
    if GATED:
        result = value * _activated(gate, ACTIVATION)
    else:
        result = _activated(value, ACTIVATION)
    out_at = out + start * WIDTH + (row[:, None] * WIDTH + column[None, :])
    tl.store(out_at, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def _activate_backward(
    grad,  # [rows, WIDTH]
    hidden,  # [rows, HIDDEN]
    bias,  # [experts, HIDDEN] or None
    expert_of_row,  # [rows] or None
    grad_hidden,  # [rows, HIDDEN]
    segments,  # fp32 [blocks + experts, HIDDEN] or None
    rows,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    HIDDEN: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    CHUNKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // CHUNKS
    start = block.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
    known = row < rows - start
    wanted = column < WIDTH
    real = known[:, None] & wanted[None, :]
    cell = row[:, None] * HIDDEN + column[None, :]
    change = tl.load(
        grad + start * WIDTH + (row[:, None] * WIDTH + column[None, :]), mask=real, other=0.0
    ).to(tl.float32)
    value = tl.load(hidden + start * HIDDEN + cell, mask=real, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(hidden + start * HIDDEN + cell + WIDTH, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        expert = tl.load(expert_of_row + start + row, mask=known, other=0).to(tl.int32)
        bias_at = bias + (expert[:, None] * HIDDEN + column[None, :])
        value += tl.load(bias_at, mask=real, other=0.0).to(tl.float32)
        if GATED:
            gate += tl.load(bias_at + WIDTH, mask=real, other=0.0).to(tl.float32)
    if GATED:
        change_gate = change * value * _slope(gate, ACTIVATION)
        change_value = change * _activated(gate, ACTIVATION)
    else:
        change_value = change * _slope(value, ACTIVATION)
    kind = grad_hidden.dtype.element_ty
    out_at = grad_hidden + start * HIDDEN + cell
    tl.store(out_at, change_value.to(kind), mask=real)
    if GATED:
        tl.store(out_at + WIDTH, change_gate.to(kind), mask=real)
    if segments is not None:
        first = tl.load(expert_of_row + start).to(tl.int32)
        last = tl.load(expert_of_row + tl.minimum(start + ROWS, rows) - 1).to(tl.int32)
        store_segments(segments, change_value, expert, first, last, block, column, HIDDEN, wanted)
        if GATED:
            store_segments(segments + WIDTH, change_gate, expert, first, last, block, column, HIDDEN, wanted)
