# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The random numbers of ``rxt_dist.randomness`` where they are used: none of them is stored on its own.

Keys and words are the same bits as there; normal numbers differ in how a device rounds logarithm, sine and
cosine (by less than 1e-5).

Shape legend: L layers, B lanes, S slots, D width, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NUMBERS = 2048  # of a program
_WARPS = 4
CONSTANT, UNIFORM, NORMAL = 0, 1, 2


def block_shape(rows: int, width: int) -> dict[str, int]:
    """Rows (of at most ``rows``) and columns that a program holds at once."""
    columns = max(2, triton.next_power_of_2(width))
    return {"ROWS": min(max(1, _NUMBERS // columns), triton.next_power_of_2(rows)), "COLUMNS": columns}


def add_normals(values: torch.Tensor, keys: torch.Tensor, level: float) -> torch.Tensor:
    """Contiguous ``values`` [..., D], not empty, with normal numbers times ``level``, a row for each of the
    int64 ``keys`` [...]."""
    out = torch.empty_like(values)
    rows, width = keys.numel(), values.shape[-1]
    shape = block_shape(rows, width)
    grid = (triton.cdiv(rows, shape["ROWS"]),)
    _add_normals[grid](values, keys.contiguous(), out, rows, level, WIDTH=width, num_warps=_WARPS, **shape)
    return out


def with_draws(
    stm: torch.Tensor, where: torch.Tensor, keys: torch.Tensor, kind: int, scale: float
) -> torch.Tensor:
    """Contiguous fp32 ``stm`` [L, B, S, D], not empty, drawn anew in the lanes ``where`` bool [B].

    ``kind``: normal numbers times ``scale``, uniform ones in [0, scale), or ``scale`` itself, by the key of
    the lane (``keys`` int64 [B]) and the number of the row in its L * S.
    """
    layers, lanes, slots, width = stm.shape
    out = torch.empty_like(stm)
    shape = block_shape(slots, width)
    grid = (layers * lanes * triton.cdiv(slots, shape["ROWS"]),)
    _with_draws[grid](
        stm, where, keys, out, lanes, scale, SLOTS=slots, WIDTH=width, KIND=kind, num_warps=_WARPS, **shape
    )
    return out


@triton.jit
def fold(keys, counters):
    """``fold_in`` of uint64 keys and counters."""
    value = keys + 0x9E3779B97F4A7C15 + counters
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def normals(keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 [ROWS, COLUMNS] by Box-Muller from a uint64 key a row; COLUMNS is even."""
    words = fold(keys[:, None], tl.arange(0, COLUMNS // 2).to(tl.uint64)[None, :])
    high = (words >> 32).to(tl.uint32).to(tl.float32)
    low = words.to(tl.uint32).to(tl.float32)
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log((high + 1.0) * 2.3283064365386963e-10), 0.0))  # 2^-32
    angle = low * 1.4629180792671596e-09  # 2 pi 2^-32
    return tl.reshape(tl.join(radius * tl.cos(angle), radius * tl.sin(angle)), (ROWS, COLUMNS))


@triton.jit
def _add_normals(
    values,  # [rows, WIDTH]
    keys,  # [rows]
    out,  # [rows, WIDTH]
    rows,
    level,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = (row < rows)[:, None] & (column < WIDTH)[None, :]
    cell = row[:, None] * WIDTH + column[None, :]
    key = tl.load(keys + row, mask=row < rows, other=0).to(tl.uint64, bitcast=True)
    value = tl.load(values + cell, mask=real, other=0.0)
    noise = (normals(key, ROWS, COLUMNS) * level).to(value.dtype).to(tl.float32)
    tl.store(out + cell, (value.to(tl.float32) + noise).to(value.dtype), mask=real)


@triton.jit
def _with_draws(
    stm,  # [layers, lanes, SLOTS, WIDTH]
    where,  # [lanes]
    keys,  # [lanes]
    out,  # as stm
    lanes,
    scale,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (SLOTS + ROWS - 1) // ROWS
    slot = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    memory = tl.program_id(0) // BLOCKS
    lane = memory % lanes
    column = tl.arange(0, COLUMNS)
    real = (slot < SLOTS)[:, None] & (column < WIDTH)[None, :]
    cell = memory.to(tl.int64) * (SLOTS * WIDTH) + slot[:, None] * WIDTH + column[None, :]
    if tl.load(where + lane):
        key = tl.load(keys + lane).to(tl.uint64, bitcast=True)
        row_key = fold(key, (memory // lanes * SLOTS + slot).to(tl.uint64))
        if KIND == 2:
            drawn = normals(row_key, ROWS, COLUMNS) * scale
        elif KIND == 1:
            words = fold(row_key[:, None], column.to(tl.uint64)[None, :])
            drawn = (words >> 40).to(tl.uint32).to(tl.float32) * 5.9604644775390625e-08 * scale  # 2^-24
        else:
            drawn = tl.zeros([ROWS, COLUMNS], tl.float32) + scale
        tl.store(out + cell, drawn, mask=real)
    else:
        tl.store(out + cell, tl.load(stm + cell, mask=real, other=0.0), mask=real)
