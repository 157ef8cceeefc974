"""Counting sort of small numbers, stable and without atomic additions.

Blocks of rows count their keys; sums over the blocks before give each block and key its first place; every
row counts the rows before it in its own block.

Shape legend: n rows, B blocks of R rows, E keys; G keys of a program, S blocks that it sums at once.
"""

# ruff: noqa: N803 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 128
_KEYS = 8  # of 4 bytes: what a memory access brings
_BLOCKS = 1024


def counting_sort(
    keys: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort ``keys`` int64 [n], each in [0, ``count``), in three kernels.

    Returns:
        (order int64 [n], sorted row i is row ``order[i]``; its inverse; sorted keys int64 [n]; end of each
        key's run, int32 [E]).
    """
    keys = keys.contiguous()
    rows = keys.shape[0]
    blocks = max(1, -(-rows // _ROWS))
    order, inverse, ordered = torch.empty_like(keys), torch.empty_like(keys), torch.empty_like(keys)
    ends = keys.new_empty(count, dtype=torch.int32)
    upto = keys.new_empty(blocks, count, dtype=torch.int32)
    first = torch.empty_like(upto)
    columns = 1 << (count - 1).bit_length()
    _count[(blocks,)](keys, upto, rows, E=count, COLUMNS=max(32, columns), R=_ROWS)
    _add_blocks[(-(-count // _KEYS),)](upto, first, ends, blocks, E=count, G=_KEYS, S=_BLOCKS, num_warps=8)
    _place[(blocks,)](keys, first, order, inverse, ordered, rows, E=count, R=_ROWS)
    return order, inverse, ordered, ends


def count_keys(keys: torch.Tensor, count: int) -> torch.Tensor:
    """The last result of :func:`counting_sort` alone, in two kernels."""
    keys = keys.contiguous()
    rows = keys.shape[0]
    blocks = max(1, -(-rows // _ROWS))
    ends = keys.new_empty(count, dtype=torch.int32)
    upto = keys.new_empty(blocks, count, dtype=torch.int32)
    columns = 1 << (count - 1).bit_length()
    _count[(blocks,)](keys, upto, rows, E=count, COLUMNS=max(32, columns), R=_ROWS)
    _add_blocks[(-(-count // _KEYS),)](upto, None, ends, blocks, E=count, G=_KEYS, S=_BLOCKS, num_warps=8)
    return ends


@triton.jit
def _count(keys, upto, rows, E: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr):
    """``upto`` [B, E]: keys of each block that are at most e."""
    block = tl.program_id(0)
    row = block * R + tl.arange(0, R)
    key = tl.load(keys + row, mask=row < rows, other=0).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    found = tl.cumsum(tl.histogram(key, COLUMNS, mask=row < rows), 0)
    tl.store(upto + block * E + column, found, mask=column < E)


@triton.jit
def _add_blocks(upto, first, ends, blocks, E: tl.constexpr, G: tl.constexpr, S: tl.constexpr):
    """Where each run ends, and ``first`` [B, E]: where the rows of a block with key e would begin if all rows
    of the block with smaller keys came before them."""
    key = tl.program_id(0) * G + tl.arange(0, G)
    line = tl.arange(0, S)
    # Numbers below e come out of the column before, whose sum over all blocks is where the run of e begins.
    end = tl.zeros([G], tl.int32)
    begin = tl.zeros([G], tl.int32)
    start = 0
    while start < blocks:
        block = start + line[:, None]
        inside = (block < blocks) & (key < E)[None, :]
        place = upto + block * E + key[None, :]
        end += tl.sum(tl.load(place, mask=inside, other=0), 0)
        begin += tl.sum(tl.load(place - 1, mask=inside & (key > 0)[None, :], other=0), 0)
        start += S
    tl.store(ends + key, end, mask=key < E)
    if first is not None:
        start = 0
        while start < blocks:
            block = start + line[:, None]
            inside = (block < blocks) & (key < E)[None, :]
            place = upto + block * E + key[None, :]
            below = tl.load(place - 1, mask=inside & (key > 0)[None, :], other=0)
            own = tl.load(place, mask=inside, other=0) - below
            before = tl.cumsum(own, 0) - own
            tl.store(first + block * E + key[None, :], begin[None, :] + before - below, mask=inside)
            begin += tl.sum(own, 0)
            start += S


@triton.jit
def _place(keys, first, order, inverse, ordered, rows, E: tl.constexpr, R: tl.constexpr):
    block = tl.program_id(0)
    number = tl.arange(0, R)
    row = block * R + number
    known = row < rows
    key = tl.load(keys + row, mask=known, other=E)
    rank = key.to(tl.int32) * R + number  # distinct, in the order of the block's rows when sorted
    before = tl.sum((rank[:, None] < rank[None, :]).to(tl.int32), 0)
    place = tl.load(first + block * E + key, mask=known, other=0) + before
    tl.store(inverse + row, place.to(tl.int64), mask=known)
    tl.store(order + place, row.to(tl.int64), mask=known)
    tl.store(ordered + place, key, mask=known)
