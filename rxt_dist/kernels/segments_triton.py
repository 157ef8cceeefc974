# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sums over the rows of each expert without atomic additions, in an order that never changes.

Rows are sorted by expert, and a block of them belongs to one expert: program b of a kernel, one of
:func:`blocks_of_runs`, works on the rows that :func:`block_of_run` tells it, and what they add to the sum is
segment b. An expert's segments follow one another.

Shape legend: n rows, E experts, W width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def blocks_of_runs(rows: int, block: int, bias: torch.Tensor | None) -> tuple[int, dict[str, int]]:
    """Enough programs for ``rows`` rows in blocks of ``block``, each of one expert (some have nothing to do),
    and the constants E and EXPERTS of :func:`block_of_run`. ``bias``: [E, W] of the experts, if any."""
    experts = 0 if bias is None else int(bias.shape[0])
    constants = {"E": max(1, experts), "EXPERTS": max(32, 1 << (experts - 1).bit_length())}
    return (rows + block - 1) // block + experts, constants


def new_segments(rows: int, block: int, like: torch.Tensor) -> torch.Tensor:
    """Room for the segments of ``rows`` rows in blocks of ``block``, for sums ``like`` [E, W]; fp32."""
    experts, width = like.shape
    return like.new_empty((rows + block - 1) // block + experts, width, dtype=torch.float32)


def sum_segments(
    segments: torch.Tensor, offsets: torch.Tensor, block: int, like: torch.Tensor
) -> torch.Tensor:
    """Sum of each expert, in shape [E, W] and dtype of ``like``; exact zeros without rows.

    ``offsets``: int32 [E], end of each expert's rows.
    """
    sums = torch.empty_like(like)
    experts, width = like.shape
    columns = 32
    _sum_segments[(experts * ((width + columns - 1) // columns),)](
        segments, offsets, sums, WIDTH=width, BLOCK=block, SEGMENTS=64, COLUMNS=columns, num_warps=4
    )
    return sums


@triton.jit
def block_of_run(begins, ends, block, E: tl.constexpr, BLOCK: tl.constexpr):
    """Expert of ``block``, its first row, the end of the expert's rows, and whether it has a segment.

    ``begins``, ``ends``: of the rows of each expert, padded to a power of two. They are loaded by the kernel
    itself: loaded here, the compiler would believe that the kernel writes to where they come from, as they
    tell the places that it writes to. A block with a segment may have no rows: its first one is then the end.
    """
    number = tl.arange(0, begins.shape[0])
    expert = tl.sum(((number < E) & (begins // BLOCK + number <= block)).to(tl.int32), 0) - 1
    begin = tl.sum(tl.where(number == expert, begins, 0), 0)
    end = tl.sum(tl.where(number == expert, ends, 0), 0)
    start = tl.minimum(begin + (block - begin // BLOCK - expert) * BLOCK, end)
    return expert, start.to(tl.int64), end, (end > begin) & (block <= (end - 1) // BLOCK + expert)


@triton.jit
def _sum_segments(
    segments,
    offsets,
    sums,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // CHUNKS
    column = (tl.program_id(0) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    at = start // BLOCK + expert
    after = tl.where(end > start, (end - 1) // BLOCK + expert + 1, at)
    total = tl.zeros([SEGMENTS, COLUMNS], tl.float32)
    while at < after:
        segment = at + tl.arange(0, SEGMENTS)
        real = (segment < after)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(
            segments + segment[:, None].to(tl.int64) * WIDTH + column[None, :], mask=real, other=0.0
        )
        at += SEGMENTS
    tl.store(sums + expert * WIDTH + column, tl.sum(total, axis=0), mask=column < WIDTH)
