# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Losses of a memory write, in one pass over the memories each way.

Shape legend: L layers, B lanes, S slots, N tokens, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rxt_dist.kernels.random_triton import block_shape, normals

_WARPS = 4


def losses_forward(
    level: float,
    after: torch.Tensor,
    before: torch.Tensor,
    layers: torch.Tensor,
    weights: torch.Tensor,
    factors: torch.Tensor,
    cu: torch.Tensor,
    present: torch.Tensor,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Both losses, fp32 [2]; arguments, all contiguous, as of :mod:`rxt_dist.stages.write_losses`."""
    depth, lanes, slots, width = after.shape
    shape = block_shape(slots, width)
    programs = depth * lanes * triton.cdiv(slots, shape["ROWS"])
    parts = after.new_empty(2, programs)
    _forward[(programs,)](
        after, before, layers, weights, factors, cu, present, noise, parts, programs, level, lanes,
        layers.shape[1], DEPTH=depth, SLOTS=slots, WIDTH=width, num_warps=_WARPS, **shape,
    )  # fmt: skip
    return parts.sum(1)


def losses_backward(
    level: float,
    of_before: bool,
    grads: torch.Tensor,
    after: torch.Tensor,
    before: torch.Tensor,
    layers: torch.Tensor,
    weights: torch.Tensor,
    factors: torch.Tensor,
    cu: torch.Tensor,
    present: torch.Tensor,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of ``after`` and, if asked for, of ``before``, from those of the two losses, fp32 [2]."""
    depth, lanes, slots, width = after.shape
    shape = block_shape(slots, width)
    grad_after = torch.empty_like(after)
    grad_before = torch.empty_like(before) if of_before else None
    _backward[(depth * lanes * triton.cdiv(slots, shape["ROWS"]),)](
        grads, after, before, layers, weights, factors, cu, present, noise, grad_after, grad_before, level,
        lanes, layers.shape[1], DEPTH=depth, SLOTS=slots, WIDTH=width, num_warps=_WARPS, **shape,
    )  # fmt: skip
    return grad_after, grad_before


@triton.jit
def _label(
    old,
    layers,
    weights,
    cu,
    present,
    noise,
    level,
    tokens,
    layer,
    lane,
    slot,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Labels of the slots [ROWS, COLUMNS], and which of them have one."""
    start = tl.load(cu + lane).to(tl.int64)
    length = tl.load(cu + lane + 1).to(tl.int64) - start
    counted = (slot < length) & (slot < SLOTS) & (tl.load(present + lane) != 0)
    token = layer.to(tl.int64) * tokens + start + slot
    column = tl.arange(0, COLUMNS)
    real = counted[:, None] & (column < WIDTH)[None, :]
    new = tl.load(layers + token[:, None] * WIDTH + column[None, :], mask=real, other=0.0).to(tl.float32)
    share = tl.load(weights + lane)
    label = (1.0 - share) * old + share * new
    if noise is not None:
        key = tl.load(noise + token, mask=counted, other=0).to(tl.uint64, bitcast=True)
        label += tl.where((column < WIDTH)[None, :], normals(key, ROWS, COLUMNS) * level, 0.0)
    return label, counted


@triton.jit
def _forward(
    after,  # [DEPTH, lanes, SLOTS, WIDTH]
    before,
    layers,  # [DEPTH, tokens, WIDTH]
    weights,  # [lanes]
    factors,  # [lanes]
    cu,  # [lanes + 1]
    present,  # [lanes]
    noise,  # [DEPTH, tokens] or None
    parts,  # [2, programs]
    programs,
    level,
    lanes,
    tokens,
    DEPTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (SLOTS + ROWS - 1) // ROWS
    slot = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    memory = tl.program_id(0) // BLOCKS
    layer, lane = memory // lanes, memory % lanes
    column = tl.arange(0, COLUMNS)
    real = (slot < SLOTS)[:, None] & (column < WIDTH)[None, :]
    cell = memory.to(tl.int64) * (SLOTS * WIDTH) + slot[:, None] * WIDTH + column[None, :]
    found = tl.load(after + cell, mask=real, other=0.0)
    old = tl.load(before + cell, mask=real, other=0.0)
    label, counted = _label(
        old, layers, weights, cu, present, noise, level, tokens, layer, lane, slot, WIDTH, SLOTS, ROWS,
        COLUMNS,
    )  # fmt: skip
    size = tl.sqrt(tl.sum(found * found, 1))
    cosine = tl.sum(found * label, 1) / tl.maximum(size, 1e-8)
    cosine = cosine / tl.maximum(tl.sqrt(tl.sum(label * label, 1)), 1e-8)
    change = found - old
    tl.store(parts + tl.program_id(0), tl.sum(tl.where(counted, cosine, 0.0), 0) * (-1.0 / DEPTH))
    squares = tl.sum(tl.sum(change * change, 1), 0) * (1.0 / (DEPTH * SLOTS * WIDTH))
    tl.store(parts + programs + tl.program_id(0), squares * tl.load(factors + lane))


@triton.jit
def _backward(
    grads,  # [2]
    after,  # [DEPTH, lanes, SLOTS, WIDTH]
    before,
    layers,  # [DEPTH, tokens, WIDTH]
    weights,  # [lanes]
    factors,  # [lanes]
    cu,  # [lanes + 1]
    present,  # [lanes]
    noise,  # [DEPTH, tokens] or None
    grad_after,  # as after
    grad_before,  # as before, or None
    level,
    lanes,
    tokens,
    DEPTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (SLOTS + ROWS - 1) // ROWS
    slot = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    memory = tl.program_id(0) // BLOCKS
    layer, lane = memory // lanes, memory % lanes
    column = tl.arange(0, COLUMNS)
    real = (slot < SLOTS)[:, None] & (column < WIDTH)[None, :]
    cell = memory.to(tl.int64) * (SLOTS * WIDTH) + slot[:, None] * WIDTH + column[None, :]
    found = tl.load(after + cell, mask=real, other=0.0)
    old = tl.load(before + cell, mask=real, other=0.0)
    label, counted = _label(
        old, layers, weights, cu, present, noise, level, tokens, layer, lane, slot, WIDTH, SLOTS, ROWS,
        COLUMNS,
    )  # fmt: skip
    size = tl.sqrt(tl.sum(found * found, 1))
    shrink = 1.0 / tl.maximum(size, 1e-8)
    unit = tl.where(size > 0.0, 1.0 / tl.where(size > 0.0, size, 1.0), 0.0)
    of_label = shrink / tl.maximum(tl.sqrt(tl.sum(label * label, 1)), 1e-8)
    of_found = tl.sum(found * label, 1) * of_label * shrink * unit
    distance = tl.load(grads) * (-1.0 / DEPTH)
    turned = (label * of_label[:, None] - found * of_found[:, None]) * distance
    factor = tl.load(grads + 1) * tl.load(factors + lane) * (2.0 / (DEPTH * SLOTS * WIDTH))
    change = (found - old) * factor
    tl.store(grad_after + cell, tl.where(counted[:, None], turned, 0.0) + change, mask=real)
    if grad_before is not None:
        tl.store(grad_before + cell, -change, mask=real)
