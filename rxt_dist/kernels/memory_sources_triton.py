# ruff: noqa: N803 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the slots of a memory read of it: RMS norms of all layers and of their means, and gated mixtures of
both. One pass over the memory for the sums that gates see, and one for what is read.

Shape legend: L layers, G groups of layers, B lanes, S slots, D width, R = B * S rows of a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NUMBERS = 512  # of a tensor in a program
_CHUNKS = 256  # programs that share the rows of a layer, where columns are summed
_WARPS = 1  # so that no warps wait for one another to sum up a row


def row_shape(width: int) -> dict[str, int]:
    """Width, rows and columns of the tiles of a program."""
    columns = triton.next_power_of_2(width)
    return {"WIDTH": width, "ROWS": max(1, _NUMBERS // columns), "COLUMNS": columns}


def norm_sums(
    stm: torch.Tensor, weight: torch.Tensor, mean_weight: torch.Tensor, present: torch.Tensor | None,
    groups: int, eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """From contiguous fp32 ``stm`` [L, B, S, D], ``weight`` [L, D] and ``mean_weight`` [D], all fp32:

    of every row 1 / RMS, its sum and the sum of the normed row, [L, B, S] each; the mean over each group's
    layers [G, B, S, D]; and of this 1 / RMS and the sum of the normed row, [G, B, S] each. Rows of absent
    lanes count as zeros.
    """
    layers, lanes, slots, width = stm.shape
    inverse, plain, total = (stm.new_empty(layers, lanes, slots) for _ in range(3))
    mean = stm.new_empty(groups, lanes, slots, width)
    mean_inverse, mean_total = (stm.new_empty(groups, lanes, slots) for _ in range(2))
    shape = row_shape(width)
    rows = lanes * slots
    _norm_sums[(triton.cdiv(rows, shape["ROWS"]), groups)](
        stm, weight, mean_weight, present, inverse, plain, total, mean, mean_inverse, mean_total, rows,
        SLOTS=slots, EPS=eps, GROUP=layers // groups, num_warps=_WARPS, **shape,
    )  # fmt: skip
    return inverse, plain, total, mean, mean_inverse, mean_total


def weighted_rows(x: torch.Tensor, factor: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """Sum over the rows of ``x`` [M, B, S, D] times ``factor`` [M, B, S]: fp32 [M, D]; absent lanes count as
    zeros."""
    layers, lanes, slots, width = x.shape
    parts = x.new_empty(layers, _CHUNKS, width)
    _weighted_rows[(layers * _CHUNKS,)](
        x, factor, present, parts, lanes * slots, SLOTS=slots, CHUNKS=_CHUNKS, num_warps=_WARPS,
        **row_shape(width),
    )  # fmt: skip
    return parts.sum(1)


def mixed_rows(
    offset: float, dtype: torch.dtype,
    stm: torch.Tensor, weight: torch.Tensor, mean_weight: torch.Tensor, present: torch.Tensor | None,
    inverse: torch.Tensor, mean: torch.Tensor, mean_inverse: torch.Tensor, value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The normed rows x, and (1 - v) x + (offset + v) y with the normed mean y and ``value`` v [L, B, S]:
    [L, R, D] each, of ``dtype``."""
    layers, lanes, slots, width = stm.shape
    rows, groups = lanes * slots, mean.shape[0]
    normed, mixed = (torch.empty((layers, rows, width), dtype=dtype, device=stm.device) for _ in range(2))
    shape = row_shape(width)
    _mixed_rows[(layers * triton.cdiv(rows, shape["ROWS"]),)](
        stm, weight, mean_weight, present, inverse, mean, mean_inverse, value, normed, mixed, rows,
        SLOTS=slots, OFFSET=offset, LAYERS=layers, GROUP=layers // groups, num_warps=_WARPS, **shape,
    )  # fmt: skip
    return normed, mixed


def mixed_rows_backward(
    offset: float,
    stm: torch.Tensor, weight: torch.Tensor, mean_weight: torch.Tensor, present: torch.Tensor | None,
    inverse: torch.Tensor, mean: torch.Tensor, mean_inverse: torch.Tensor, value: torch.Tensor,
    grad_normed: torch.Tensor, grad_mixed: torch.Tensor, grad_same: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of the weight [L, D], the mean's weight [D] and the value [L, B, S]; the mixture's gradient
    is the sum of the last two arguments."""
    layers, lanes, slots, width = stm.shape
    parts = stm.new_empty(2, layers, _CHUNKS, width)
    grad_value = torch.empty_like(value)
    _mixed_rows_backward[(layers * _CHUNKS,)](
        stm, weight, mean_weight, present, inverse, mean, mean_inverse, value, grad_normed, grad_mixed,
        grad_same, parts, grad_value, lanes * slots, SLOTS=slots, OFFSET=offset, LAYERS=layers,
        GROUP=layers // mean.shape[0], CHUNKS=_CHUNKS, num_warps=_WARPS, **row_shape(width),
    )  # fmt: skip
    sums = parts.sum(2)
    return sums[0], sums[1].sum(0), grad_value


@triton.jit
def rows_of(x, present, row, rows, SLOTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 rows of [rows, WIDTH]; zeros in absent lanes, whatever they hold."""
    column = tl.arange(0, COLUMNS)
    known = row < rows
    if present is not None:
        known = known & (tl.load(present + row // SLOTS, mask=known, other=0) != 0)
    real = known[:, None] & (column < WIDTH)[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * WIDTH + column[None, :], mask=real, other=0.0)


@triton.jit
def _norm_sums(
    stm,  # [GROUPS * GROUP, rows, WIDTH]
    weight,  # [GROUPS * GROUP, WIDTH]
    mean_weight,  # [WIDTH]
    present,  # [lanes] or None
    inverse,  # [GROUPS * GROUP, rows]
    plain,
    total,
    mean,  # [GROUPS, rows, WIDTH]
    mean_inverse,  # [GROUPS, rows]
    mean_total,
    rows,
    SLOTS: tl.constexpr,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1).to(tl.int64)
    known = row < rows
    column = tl.arange(0, COLUMNS)
    wanted = column < WIDTH
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    for number in tl.static_range(GROUP):
        layer = group * GROUP + number
        x = rows_of(stm + layer * rows * WIDTH, present, row, rows, SLOTS, WIDTH, COLUMNS)
        scale = tl.load(weight + layer * WIDTH + column, mask=wanted, other=0.0)
        shrink = 1.0 / tl.sqrt(tl.sum(x * x, 1) * (1.0 / WIDTH) + EPS)
        tl.store(inverse + layer * rows + row, shrink, mask=known)
        tl.store(plain + layer * rows + row, tl.sum(x, 1), mask=known)
        tl.store(total + layer * rows + row, tl.sum(x * scale[None, :], 1) * shrink, mask=known)
        added += x
    x = added * (1.0 / GROUP)
    scale = tl.load(mean_weight + column, mask=wanted, other=0.0)
    shrink = 1.0 / tl.sqrt(tl.sum(x * x, 1) * (1.0 / WIDTH) + EPS)
    cell = (group * rows + row)[:, None] * WIDTH + column[None, :]
    tl.store(mean + cell, x, mask=known[:, None] & wanted[None, :])
    tl.store(mean_inverse + group * rows + row, shrink, mask=known)
    tl.store(mean_total + group * rows + row, tl.sum(x * scale[None, :], 1) * shrink, mask=known)


@triton.jit
def _weighted_rows(
    x,  # [layers, rows, WIDTH]
    factor,  # [layers, rows]
    present,  # [lanes] or None
    parts,  # [layers, CHUNKS, WIDTH]
    rows,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    layer = (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) % CHUNKS * ROWS, rows, CHUNKS * ROWS):
        row = first + tl.arange(0, ROWS)
        values = rows_of(x + layer * rows * WIDTH, present, row, rows, SLOTS, WIDTH, COLUMNS)
        total += values * tl.load(factor + layer * rows + row, mask=row < rows, other=0.0)[:, None]
    tl.store(parts + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


@triton.jit
def _normed_pair(
    stm, weight, mean_weight, present, inverse, mean, mean_inverse, value, layer, row, rows,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x / RMS of rows of a layer and of its group's mean, without weights; and the gate's values."""
    known = row < rows
    at = layer * rows + row
    group = layer // GROUP
    x = rows_of(stm + layer * rows * WIDTH, present, row, rows, SLOTS, WIDTH, COLUMNS)
    x *= tl.load(inverse + at, mask=known, other=0.0)[:, None]
    y = rows_of(mean + group * rows * WIDTH, None, row, rows, SLOTS, WIDTH, COLUMNS)
    y *= tl.load(mean_inverse + group * rows + row, mask=known, other=0.0)[:, None]
    return x, y, tl.load(value + at, mask=known, other=0.0)


@triton.jit
def _mixed_rows(
    stm,  # [LAYERS, rows, WIDTH]
    weight,  # [LAYERS, WIDTH]
    mean_weight,  # [WIDTH]
    present,  # [lanes] or None
    inverse,  # [LAYERS, rows]
    mean,  # [groups, rows, WIDTH]
    mean_inverse,  # [groups, rows]
    value,  # [LAYERS, rows]
    normed,  # [LAYERS, rows, WIDTH]
    mixed,
    rows,
    SLOTS: tl.constexpr,
    OFFSET: tl.constexpr,
    LAYERS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    layer = (tl.program_id(0) % LAYERS).to(tl.int64)  # all layers of a row side by side: they read one mean
    row = tl.program_id(0) // LAYERS * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wanted = column < WIDTH
    x, y, share = _normed_pair(
        stm, weight, mean_weight, present, inverse, mean, mean_inverse, value, layer, row, rows, SLOTS, GROUP,
        WIDTH, COLUMNS,
    )  # fmt: skip
    x *= tl.load(weight + layer * WIDTH + column, mask=wanted, other=0.0)[None, :]
    y *= tl.load(mean_weight + column, mask=wanted, other=0.0)[None, :]
    both = (1.0 - share)[:, None] * x + (OFFSET + share)[:, None] * y
    cell = (layer * rows + row)[:, None] * WIDTH + column[None, :]
    real = (row < rows)[:, None] & wanted[None, :]
    tl.store(normed + cell, x.to(normed.dtype.element_ty), mask=real)
    tl.store(mixed + cell, both.to(mixed.dtype.element_ty), mask=real)


@triton.jit
def _mixed_rows_backward(
    stm,  # [LAYERS, rows, WIDTH]
    weight,  # [LAYERS, WIDTH]
    mean_weight,  # [WIDTH]
    present,  # [lanes] or None
    inverse,  # [LAYERS, rows]
    mean,  # [groups, rows, WIDTH]
    mean_inverse,  # [groups, rows]
    value,  # [LAYERS, rows]
    grad_normed,  # [LAYERS, rows, WIDTH]
    grad_mixed,
    grad_same,
    parts,  # [2, LAYERS, CHUNKS, WIDTH]
    grad_value,  # [LAYERS, rows]
    rows,
    SLOTS: tl.constexpr,
    OFFSET: tl.constexpr,
    LAYERS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    layer = (tl.program_id(0) % LAYERS).to(tl.int64)
    chunk = tl.program_id(0) // LAYERS
    column = tl.arange(0, COLUMNS)
    wanted = column < WIDTH
    scale = tl.load(weight + layer * WIDTH + column, mask=wanted, other=0.0)[None, :]
    mean_scale = tl.load(mean_weight + column, mask=wanted, other=0.0)[None, :]
    own = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(chunk * ROWS, rows, CHUNKS * ROWS):
        row = first + tl.arange(0, ROWS)
        x, y, share = _normed_pair(
            stm, weight, mean_weight, present, inverse, mean, mean_inverse, value, layer, row, rows, SLOTS,
            GROUP, WIDTH, COLUMNS,
        )  # fmt: skip
        start = layer * rows * WIDTH
        change = rows_of(grad_mixed + start, None, row, rows, SLOTS, WIDTH, COLUMNS).to(tl.float32)
        change += rows_of(grad_same + start, None, row, rows, SLOTS, WIDTH, COLUMNS).to(tl.float32)
        direct = rows_of(grad_normed + start, None, row, rows, SLOTS, WIDTH, COLUMNS).to(tl.float32)
        turned = tl.sum(change * (y * mean_scale - x * scale), 1)
        tl.store(grad_value + layer * rows + row, turned, mask=row < rows)
        own += (direct + (1.0 - share)[:, None] * change) * x
        of_mean += (OFFSET + share)[:, None] * change * y
    at = (layer * CHUNKS + chunk) * WIDTH + column
    tl.store(parts + at, tl.sum(own, 0), mask=wanted)
    tl.store(parts + LAYERS * CHUNKS * WIDTH + at, tl.sum(of_mean, 0), mask=wanted)
