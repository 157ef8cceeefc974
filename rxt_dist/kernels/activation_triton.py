# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Activations of rows in one pass each way: the bias of a row's expert is added on the way, never stored.

Shape legend: n rows, E experts, F width of the result, W width of the hidden rows: F, or 2F where gated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rxt_dist.kernels.segments_triton import block_of_run, blocks_of_runs, new_segments, sum_segments

_FORWARD_ROWS, _BACKWARD_ROWS = 32, 128
_COLUMNS = 64


def activate_forward(
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """Contiguous ``hidden`` [n, W], n > 0, and ``bias`` [E, W] with ``offsets`` int32 [E] -> [n, F]. Without
    a bias ``offsets`` is the last one, [1], or None: n."""
    rows, hidden_width = hidden.shape
    width = hidden_width // 2 if gated else hidden_width
    out = hidden.new_empty(rows, width)
    blocks, experts = blocks_of_runs(rows, _FORWARD_ROWS, bias)
    _activate_forward[(blocks * ((width + _COLUMNS - 1) // _COLUMNS),)](
        hidden, bias, offsets, out, rows, WIDTH=width, GATED=gated, ACTIVATION=activation,
        ROWS=_FORWARD_ROWS, COLUMNS=_COLUMNS, num_warps=4, **experts,
    )  # fmt: skip
    return out


def activate_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    activation: str,
    gated: bool,
    bias_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of ``hidden`` and, if it is wanted, of ``bias``."""
    rows, width = grad.shape
    grad_hidden = torch.empty_like(hidden)
    segments = None
    if bias is not None and bias_needs_grad:
        segments = new_segments(rows, _BACKWARD_ROWS, bias)
    blocks, experts = blocks_of_runs(rows, _BACKWARD_ROWS, bias)
    _activate_backward[(blocks * ((width + _COLUMNS - 1) // _COLUMNS),)](
        grad, hidden, bias, offsets, grad_hidden, segments, rows, WIDTH=width, GATED=gated,
        ACTIVATION=activation, BLOCK=_BACKWARD_ROWS, ROWS=32, COLUMNS=_COLUMNS, num_warps=4, **experts,
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
    bias,  # [E, HIDDEN] or None
    offsets,  # [E], or None
    out,  # [rows, WIDTH]
    rows,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    HIDDEN: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    CHUNKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    number = tl.arange(0, EXPERTS)
    begins = tl.zeros([EXPERTS], tl.int32)
    ends = begins + rows
    if offsets is not None:
        begins = tl.load(offsets + number - 1, mask=(number > 0) & (number < E), other=0)
        ends = tl.load(offsets + number, mask=number < E, other=0)
    expert, start, end, used = block_of_run(begins, ends, tl.program_id(0) // CHUNKS, E, ROWS)
    if used:
        row = tl.arange(0, ROWS)
        column = (tl.program_id(0) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = column < WIDTH
        real = (row < end - start)[:, None] & wanted[None, :]
        at = hidden + start * HIDDEN + (row[:, None] * HIDDEN + column[None, :])
        value = tl.load(at, mask=real, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(at + WIDTH, mask=real, other=0.0).to(tl.float32)
        if bias is not None:
            bias_at = bias + expert * HIDDEN + column
            value += tl.load(bias_at, mask=wanted, other=0.0).to(tl.float32)[None, :]
            if GATED:
                gate += tl.load(bias_at + WIDTH, mask=wanted, other=0.0).to(tl.float32)[None, :]
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
    bias,  # [E, HIDDEN] or None
    offsets,  # [E], or None
    grad_hidden,  # [rows, HIDDEN]
    segments,  # fp32 [blocks, HIDDEN] or None
    rows,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of BLOCK, at once
    COLUMNS: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    HIDDEN: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    CHUNKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // CHUNKS
    number = tl.arange(0, EXPERTS)
    begins = tl.zeros([EXPERTS], tl.int32)
    ends = begins + rows
    if offsets is not None:
        begins = tl.load(offsets + number - 1, mask=(number > 0) & (number < E), other=0)
        ends = tl.load(offsets + number, mask=number < E, other=0)
    expert, start, end, used = block_of_run(begins, ends, block, E, BLOCK)
    if used:
        column = (tl.program_id(0) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = column < WIDTH
        if bias is not None:
            bias_at = bias + expert * HIDDEN + column
            value_bias = tl.load(bias_at, mask=wanted, other=0.0).to(tl.float32)[None, :]
            if GATED:
                gate_bias = tl.load(bias_at + WIDTH, mask=wanted, other=0.0).to(tl.float32)[None, :]
        value_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
        gate_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in tl.range(0, BLOCK, ROWS, num_stages=3):
            row = first + tl.arange(0, ROWS)
            real = (row < end - start)[:, None] & wanted[None, :]
            cell = start * HIDDEN + (row[:, None] * HIDDEN + column[None, :])
            change = tl.load(
                grad + start * WIDTH + (row[:, None] * WIDTH + column[None, :]), mask=real, other=0.0
            ).to(tl.float32)
            value = tl.load(hidden + cell, mask=real, other=0.0).to(tl.float32)
            if bias is not None:
                value += value_bias
            if GATED:
                gate = tl.load(hidden + cell + WIDTH, mask=real, other=0.0).to(tl.float32)
                if bias is not None:
                    gate += gate_bias
                change_gate = change * value * _slope(gate, ACTIVATION)
                change_value = change * _activated(gate, ACTIVATION)
                gate_sum += change_gate
                tl.store(grad_hidden + cell + WIDTH, change_gate.to(grad_hidden.dtype.element_ty), mask=real)
            else:
                change_value = change * _slope(value, ACTIVATION)
            value_sum += change_value
            tl.store(grad_hidden + cell, change_value.to(grad_hidden.dtype.element_ty), mask=real)
        if segments is not None:
            segment = segments + block.to(tl.int64) * HIDDEN + column
            tl.store(segment, tl.sum(value_sum, 0), mask=wanted)
            if GATED:
                tl.store(segment + WIDTH, tl.sum(gate_sum, 0), mask=wanted)
