"""Counting sort of small numbers, stable and without atomic additions.

Blocks of rows count their keys; sums over the blocks before give each block and key its first place; every
row counts the rows before it in its own block.

Shape legend: n rows, B blocks of R rows, E keys; S blocks that a program sums at once.
"""

# ruff: noqa: N803 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 128
_BLOCKS = 4096


def counting_sort(
    keys: torch.Tensor, count: int, first: int = 0, *, others: bool = False, room: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort ``keys``, int64 or int32 of any shape (flattened to [n]), in three kernels.

    They are in [``first``, ``first + count``). Where there may be ``others``, these are sorted behind, as one
    key. Rows that would be sorted beyond ``room`` count as others.

    Returns:
        (order int64 [n], sorted row i is row ``order[i]``; its inverse int64 [n], -1 for the others; sorted
        keys int64 [n], numbered from 0; end of each key's run, int32 [E], ``room`` at most; int32 [1], rows
        that are no others, with and without room).
    """
    keys, copies = _lines(keys)
    rows = keys.numel()
    upto = _counts(keys, copies, count, first, others)
    starts = torch.empty_like(upto)
    order, inverse, ordered = (keys.new_empty(rows, dtype=torch.int64) for _ in range(3))
    kinds, blocks = upto.shape
    ends = upto.new_empty(kinds)
    room = rows if room is None else room
    _add_blocks[(kinds,)](upto, starts, ends, blocks, room, COUNT=count, S=_BLOCKS, num_warps=8)
    _place[(blocks,)](
        keys, starts, order, inverse, ordered, rows, keys.stride(0), blocks, room, FIRST=first, COUNT=count,
        OTHERS=others, COPIES=copies, R=_ROWS,
    )  # fmt: skip
    return order, inverse, ordered, ends[:count], ends[-1:]


def count_keys(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Ends of the keys' runs as :func:`counting_sort` finds them, alone, in two kernels."""
    keys, copies = _lines(keys)
    upto = _counts(keys, copies, count, 0, others=False)
    ends = upto.new_empty(count)
    _add_blocks[(count,)](upto, None, ends, upto.shape[1], keys.numel(), COUNT=count, S=_BLOCKS, num_warps=8)
    return ends


def _lines(keys: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``keys`` as lines of any distance, and how many of them are in a line."""
    if keys.ndim != 2 or keys.stride(1) != 1:
        keys = keys.flatten()[:, None]
    return keys, keys.shape[1]


def _counts(keys: torch.Tensor, copies: int, count: int, first: int, others: bool) -> torch.Tensor:
    """Keys of each block that are at most e, int32 [E, B]."""
    kinds = count + 1 if others else count
    blocks = max(1, -(-keys.numel() // _ROWS))
    upto = keys.new_empty(kinds, blocks, dtype=torch.int32)
    _count[(blocks,)](
        keys, upto, keys.numel(), keys.stride(0), blocks, FIRST=first, COUNT=count, OTHERS=others,
        COPIES=copies, COLUMNS=max(32, 1 << (kinds - 1).bit_length()), R=_ROWS,
    )  # fmt: skip
    return upto


# No pointer goes into these two: torch.compile would believe that what is stored by key changes the keys.
@triton.jit
def _place_in_lines(row, pitch, COPIES: tl.constexpr):
    return (row // COPIES).to(tl.int64) * pitch + row % COPIES


@triton.jit
def _numbered(key, FIRST: tl.constexpr, COUNT: tl.constexpr, OTHERS: tl.constexpr):
    key = key.to(tl.int32) - FIRST
    if OTHERS:
        key = tl.where((key >= 0) & (key < COUNT), key, COUNT)
    return key


@triton.jit
def _count(
    keys,
    upto,
    rows,
    pitch,
    blocks,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    OTHERS: tl.constexpr,
    COPIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * R + tl.arange(0, R)
    key = tl.load(keys + _place_in_lines(row, pitch, COPIES), mask=row < rows, other=FIRST)
    key = _numbered(key, FIRST, COUNT, OTHERS)
    column = tl.arange(0, COLUMNS)
    found = tl.cumsum(tl.histogram(key, COLUMNS, mask=row < rows), 0)
    tl.store(upto + column * blocks + block, found, mask=column < COUNT + OTHERS)


@triton.jit
def _add_blocks(upto, starts, ends, blocks, room, COUNT: tl.constexpr, S: tl.constexpr):
    """Where each run ends and the others begin, and ``starts`` [E, B]: where the rows of a block with key e
    would begin if all rows of the block with smaller keys came before them."""
    key = tl.program_id(0)
    line = tl.arange(0, S)
    place = upto + key * blocks
    # Numbers below e come out of the line before, whose sum over all blocks is where the run of e begins.
    end = tl.zeros([S], tl.int32)
    below = tl.zeros([S], tl.int32)
    start = 0
    while start < blocks:
        block = start + line
        end += tl.load(place + block, mask=block < blocks, other=0)
        below += tl.load(place - blocks + block, mask=(block < blocks) & (key > 0), other=0)
        start += S
    tl.store(ends + key, tl.where(key < COUNT, tl.minimum(tl.sum(end, 0), room), tl.sum(below, 0)))
    if starts is not None:
        begin = tl.sum(below, 0)
        start = 0
        while start < blocks:
            block = start + line
            smaller = tl.load(place - blocks + block, mask=(block < blocks) & (key > 0), other=0)
            own = tl.load(place + block, mask=block < blocks, other=0) - smaller
            before = tl.cumsum(own, 0) - own
            tl.store(starts + key * blocks + block, begin + before - smaller, mask=block < blocks)
            begin += tl.sum(own, 0)
            start += S


@triton.jit
def _place(
    keys,
    starts,
    order,
    inverse,
    ordered,
    rows,
    pitch,
    blocks,
    room,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    OTHERS: tl.constexpr,
    COPIES: tl.constexpr,
    R: tl.constexpr,
):
    block = tl.program_id(0)
    number = tl.arange(0, R)
    row = block * R + number
    known = row < rows
    key = _numbered(
        tl.load(keys + _place_in_lines(row, pitch, COPIES), mask=known, other=FIRST), FIRST, COUNT, OTHERS
    )
    sorting = tl.where(known, key, COUNT + OTHERS) * R + number  # distinct, in the order of the sorted rows
    before = tl.sum((sorting[:, None] < sorting[None, :]).to(tl.int32), 0)
    place = tl.load(starts + key * blocks + block, mask=known, other=0) + before
    tl.store(inverse + row, tl.where((key < COUNT) & (place < room), place, -1).to(tl.int64), mask=known)
    tl.store(order + place, row.to(tl.int64), mask=known)
    tl.store(ordered + place, key.to(tl.int64), mask=known)
