# ruff: noqa: N803 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Gated mixtures of a memory and an update, in one pass: ``(1 - v) old + (offset + v) (product + bias)``.

Shape legend: L layers, B lanes, S slots, D width, R = B * S rows of a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rxt_dist.kernels.memory_sources_triton import row_shape, rows_of

_CHUNKS = 256  # programs that share the rows of a layer, where columns are summed
_WARPS = 1


def mix_and_norm(
    offset: float, eps: float, stm: torch.Tensor, product: torch.Tensor, bias: torch.Tensor | None,
    value: torch.Tensor, weight: torch.Tensor, present: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """From fp32 ``stm`` [L, B, S, D], ``product`` [L, R, D], ``bias`` [L, D], ``value`` v fp32 [L, B, S] and
    ``weight`` fp32 [L, D], all contiguous:

    the mixture fp32 [L, B, S, D], its rows' RMS norm [L, R, D] in the dtype of ``product``, and of every row
    of the mixture 1 / RMS and the sum, fp32 [L, B, S] each. Memories of absent lanes count as zeros.
    """
    layers, lanes, slots, width = stm.shape
    mixed, normed = torch.empty_like(stm), torch.empty_like(product)
    inverse, sums = torch.empty_like(value), torch.empty_like(value)
    shape = row_shape(width)
    rows = lanes * slots
    _mix_and_norm[(triton.cdiv(rows, shape["ROWS"]), layers)](
        stm, product, bias, value, weight, present, mixed, normed, inverse, sums, rows, SLOTS=slots,
        OFFSET=offset, EPS=eps, num_warps=_WARPS, **shape,
    )  # fmt: skip
    return mixed, normed, inverse, sums


def mix_and_norm_backward(
    offset: float, stm: torch.Tensor, product: torch.Tensor, bias: torch.Tensor | None, value: torch.Tensor,
    weight: torch.Tensor, present: torch.Tensor | None, inverse: torch.Tensor, grad_mixed: torch.Tensor,
    grad_normed: torch.Tensor, grad_sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The whole gradient of the mixture, fp32 [L, B, S, D]; and those of value and weight."""
    layers, lanes, slots, width = stm.shape
    grad, grad_value = torch.empty_like(stm), torch.empty_like(value)
    parts = stm.new_empty(layers, _CHUNKS, width)
    _mix_and_norm_backward[(layers * _CHUNKS,)](
        stm, product, bias, value, weight, present, inverse, grad_mixed, grad_normed, grad_sums, grad,
        grad_value, parts, lanes * slots, SLOTS=slots, OFFSET=offset, CHUNKS=_CHUNKS, num_warps=_WARPS,
        **row_shape(width),
    )  # fmt: skip
    return grad, grad_value, parts.sum(1)


def mix_into(
    offset: float, before: torch.Tensor, old: torch.Tensor, product: torch.Tensor, bias: torch.Tensor | None,
    value: torch.Tensor, present: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The mixture of ``old`` fp32 [L, B, S, D] and an update; in absent lanes ``before``."""
    layers, lanes, slots, width = old.shape
    after = torch.empty_like(old)
    shape = row_shape(width)
    rows = lanes * slots
    _mix_into[(triton.cdiv(rows, shape["ROWS"]), layers)](
        before, old, product, bias, value, present, after, rows, SLOTS=slots, OFFSET=offset,
        num_warps=_WARPS, **shape,
    )  # fmt: skip
    return after


@triton.jit
def _update(product, bias, layer, row, rows, SLOTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    update = rows_of(product + layer * rows * WIDTH, None, row, rows, SLOTS, WIDTH, COLUMNS).to(tl.float32)
    if bias is not None:
        column = tl.arange(0, COLUMNS)
        added = tl.load(bias + layer * WIDTH + column, mask=column < WIDTH, other=0.0)
        update += added.to(tl.float32)[None, :]
    return update


@triton.jit
def _mix_and_norm(
    stm,  # [layers, rows, WIDTH]
    product,
    bias,  # [layers, WIDTH] or None
    value,  # [layers, rows]
    weight,  # [layers, WIDTH]
    present,  # [lanes] or None
    mixed,  # [layers, rows, WIDTH]
    normed,
    inverse,  # [layers, rows]
    sums,
    rows,
    SLOTS: tl.constexpr,
    OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1).to(tl.int64)
    known = row < rows
    column = tl.arange(0, COLUMNS)
    wanted = column < WIDTH
    share = tl.load(value + layer * rows + row, mask=known, other=0.0)[:, None]
    x = rows_of(stm + layer * rows * WIDTH, present, row, rows, SLOTS, WIDTH, COLUMNS)
    x = (1.0 - share) * x + (OFFSET + share) * _update(product, bias, layer, row, rows, SLOTS, WIDTH, COLUMNS)
    shrink = 1.0 / tl.sqrt(tl.sum(x * x, 1) * (1.0 / WIDTH) + EPS)
    scale = tl.load(weight + layer * WIDTH + column, mask=wanted, other=0.0)
    real = known[:, None] & wanted[None, :]
    cell = (layer * rows + row)[:, None] * WIDTH + column[None, :]
    tl.store(mixed + cell, x, mask=real)
    tl.store(normed + cell, (x * shrink[:, None] * scale[None, :]).to(normed.dtype.element_ty), mask=real)
    tl.store(inverse + layer * rows + row, shrink, mask=known)
    tl.store(sums + layer * rows + row, tl.sum(x, 1), mask=known)


@triton.jit
def _mix_and_norm_backward(
    stm,  # [layers, rows, WIDTH]
    product,
    bias,  # [layers, WIDTH] or None
    value,  # [layers, rows]
    weight,  # [layers, WIDTH]
    present,  # [lanes] or None
    inverse,  # [layers, rows]
    grad_mixed,  # [layers, rows, WIDTH]
    grad_normed,
    grad_sums,  # [layers, rows]
    grad,  # [layers, rows, WIDTH]
    grad_value,  # [layers, rows]
    parts,  # [layers, CHUNKS, WIDTH]
    rows,
    SLOTS: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    layer = (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    wanted = column < WIDTH
    scale = tl.load(weight + layer * WIDTH + column, mask=wanted, other=0.0)[None, :]
    start = layer * rows * WIDTH
    own = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) % CHUNKS * ROWS, rows, CHUNKS * ROWS):
        row = first + tl.arange(0, ROWS)
        known = row < rows
        at = layer * rows + row
        x = rows_of(stm + start, present, row, rows, SLOTS, WIDTH, COLUMNS)
        update = _update(product, bias, layer, row, rows, SLOTS, WIDTH, COLUMNS)
        share = tl.load(value + at, mask=known, other=0.0)[:, None]
        shrink = tl.load(inverse + at, mask=known, other=0.0)[:, None]
        unit = ((1.0 - share) * x + (OFFSET + share) * update) * shrink
        turned = rows_of(grad_normed + start, None, row, rows, SLOTS, WIDTH, COLUMNS).to(tl.float32)
        own += turned * unit
        turned *= scale
        along = tl.sum(turned * unit, 1)[:, None] * (1.0 / WIDTH)
        change = rows_of(grad_mixed + start, None, row, rows, SLOTS, WIDTH, COLUMNS)
        change += (turned - unit * along) * shrink + tl.load(grad_sums + at, mask=known, other=0.0)[:, None]
        cell = at[:, None] * WIDTH + column[None, :]
        tl.store(grad + cell, change, mask=known[:, None] & wanted[None, :])
        moved = tl.where(wanted[None, :], change * (update - x), 0.0)
        tl.store(grad_value + at, tl.sum(moved, 1), mask=known)
    tl.store(parts + tl.program_id(0) * WIDTH + column, tl.sum(own, 0), mask=wanted)


@triton.jit
def _mix_into(
    before,  # [layers, rows, WIDTH]
    old,
    product,
    bias,  # [layers, WIDTH] or None
    value,  # [layers, rows]
    present,  # [lanes] or None
    after,  # [layers, rows, WIDTH]
    rows,
    SLOTS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1).to(tl.int64)
    known = row < rows
    column = tl.arange(0, COLUMNS)
    share = tl.load(value + layer * rows + row, mask=known, other=0.0)[:, None]
    x = rows_of(old + layer * rows * WIDTH, None, row, rows, SLOTS, WIDTH, COLUMNS)
    x = (1.0 - share) * x + (OFFSET + share) * _update(product, bias, layer, row, rows, SLOTS, WIDTH, COLUMNS)
    real = known[:, None] & (column < WIDTH)[None, :]
    cell = (layer * rows + row)[:, None] * WIDTH + column[None, :]
    if present is not None:
        here = tl.load(present + row // SLOTS, mask=known, other=0) != 0
        kept = tl.load(before + cell, mask=real & ~here[:, None], other=0.0)
        x = tl.where(here[:, None], x, kept)
    tl.store(after + cell, x, mask=real)
