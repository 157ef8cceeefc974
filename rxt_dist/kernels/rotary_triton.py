"""Rotation of channel pairs, of all heads of a fused projection in one kernel, and its gradient in another.

Shape legend: N tokens, H heads, Hq query heads, Hk key/value heads, d head width; T rows of a program.
"""

# ruff: noqa: N803, N806 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_TILE = 4096  # numbers a program holds of one of queries, keys and values: 32 a thread


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, halves: bool) -> torch.Tensor:
    """``x`` [..., N, H, d], its pairs (2i, 2i+1) turned by the angles of ``cos`` and ``sin`` [N, 1, d/2].

    With ``halves`` the first members of all turned pairs come before all second members.
    """
    out: torch.Tensor = _Rotate.apply(x, cos, sin, halves)  # type: ignore[no-untyped-call]
    return out


def rotated_heads(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, query_heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [N, Hq, d] and keys [N, Hk, d], rotated, and values [N, Hk, d] of ``heads`` [N, Hq + 2 Hk, d].

    Values are copied: as a view they would keep the queries and keys from before the rotation in memory.
    """
    q, k, v = _RotateHeads.apply(heads, cos, sin, query_heads, kv_heads)  # type: ignore[no-untyped-call]
    return q, k, v


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.halves = halves
        return _turned(x, cos, sin, inverse=False, halves=halves)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _turned(grads[0], *ctx.saved_tensors, inverse=True, halves=ctx.halves), None, None, None


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool, halves: bool
) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    heads, half = x.shape[-2], x.shape[-1] // 2
    rows = x.numel() // (2 * heads * half)
    padded = {"HEADS": _power_of_two(heads), "C": _power_of_two(half)}
    height = max(1, _TILE // (2 * padded["HEADS"] * padded["C"]))
    _rotate[(max(1, -(-rows // height)),)](
        x,
        out,
        cos,
        sin,
        rows,
        x.shape[-3],
        H=heads,
        D2=half,
        INVERSE=inverse,
        HALVES=halves,
        T=height,
        **padded,
    )
    return out


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_heads: int,
        kv_heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = heads.contiguous()
        rows, _, width = heads.shape
        ctx.save_for_backward(cos, sin)
        ctx.heads = query_heads, kv_heads
        q = heads.new_empty(rows, query_heads, width)
        k = heads.new_empty(rows, kv_heads, width)
        v = torch.empty_like(k)
        height, sizes = _sizes(query_heads, kv_heads, width)
        _rotate_heads[(max(1, -(-rows // height)),)](
            heads, q, k, v, cos, sin, rows, INVERSE=False, T=height, **sizes
        )
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        q, k, v = (grad.contiguous() for grad in grads)
        cos, sin = ctx.saved_tensors
        query_heads, kv_heads = ctx.heads
        rows, _, width = q.shape
        out = q.new_empty(rows, query_heads + 2 * kv_heads, width)
        height, sizes = _sizes(query_heads, kv_heads, width)
        _rotate_heads[(max(1, -(-rows // height)),)](
            out, q, k, v, cos, sin, rows, INVERSE=True, T=height, **sizes
        )
        return out, None, None, None, None


def _sizes(query_heads: int, kv_heads: int, width: int) -> tuple[int, dict[str, int]]:
    half = width // 2
    sizes = {
        "HQ": query_heads,
        "HK": kv_heads,
        "D2": half,
        "QUERIES": _power_of_two(query_heads),
        "KEYS": _power_of_two(kv_heads),
        "C": _power_of_two(half),
    }
    return max(1, _TILE // (2 * max(sizes["QUERIES"], sizes["KEYS"]) * sizes["C"])), sizes


@triton.jit
def _angles(cos, sin, row, known, D2: tl.constexpr, C: tl.constexpr):
    """Cosines and sines [T, 1, C] of tokens ``row``."""
    channel = tl.arange(0, C)[None, None, :]
    place = row[:, None, None] * D2 + channel
    real = known[:, None, None] & (channel < D2)
    c = tl.load(cos + place, mask=real, other=0.0).to(tl.float32)
    s = tl.load(sin + place, mask=real, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def _spots(
    row, known, STRIDE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, W: tl.constexpr
):
    """Places [T, HEADS * W] of the numbers of H heads of width D, and which of them exist."""
    column = tl.arange(0, HEADS * W)[None, :]
    head, channel = column // W, column % W
    place = row[:, None].to(tl.int64) * STRIDE + head * D + channel
    return place, known[:, None] & (head < H) & (channel < D)


@triton.jit
def _half_spots(
    row, known, STRIDE: tl.constexpr, H: tl.constexpr, D2: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr
):
    """Places [T, HEADS, C] of the first half of each head, and which of them exist."""
    head = tl.arange(0, HEADS)[None, :, None]
    channel = tl.arange(0, C)[None, None, :]
    place = row[:, None, None].to(tl.int64) * STRIDE + head * (2 * D2) + channel
    return place, known[:, None, None] & (head < H) & (channel < D2)


@triton.jit
def _turn(
    source,
    target,
    c,
    s,
    row,
    known,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    H: tl.constexpr,
    D2: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    FROM_HALVES: tl.constexpr = False,
    TO_HALVES: tl.constexpr = False,
):
    """Turn H heads of rows that lie SOURCE and TARGET numbers apart."""
    if FROM_HALVES:
        place, real = _half_spots(row, known, SOURCE, H, D2, HEADS, C)
        even = tl.load(source + place, mask=real, other=0.0)
        odd = tl.load(source + place + D2, mask=real, other=0.0)
    else:
        place, real = _spots(row, known, SOURCE, H, 2 * D2, HEADS, 2 * C)
        pairs = tl.load(source + place, mask=real, other=0.0)
        even, odd = tl.split(tl.reshape(pairs, [T, HEADS, C, 2]))
    even = even.to(tl.float32)
    odd = odd.to(tl.float32)
    first = (even * c - odd * s).to(target.dtype.element_ty)
    second = (even * s + odd * c).to(target.dtype.element_ty)
    if TO_HALVES:
        place, real = _half_spots(row, known, TARGET, H, D2, HEADS, C)
        tl.store(target + place, first, mask=real)
        tl.store(target + place + D2, second, mask=real)
    else:
        place, real = _spots(row, known, TARGET, H, 2 * D2, HEADS, 2 * C)
        tl.store(target + place, tl.reshape(tl.join(first, second), [T, HEADS * 2 * C]), mask=real)


@triton.jit
def _copy(
    source,
    target,
    row,
    known,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    H: tl.constexpr,
    D2: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
):
    place, real = _spots(row, known, SOURCE, H, 2 * D2, HEADS, 2 * C)
    numbers = tl.load(source + place, mask=real)
    place, real = _spots(row, known, TARGET, H, 2 * D2, HEADS, 2 * C)
    tl.store(target + place, numbers, mask=real)


@triton.jit
def _rotate(
    x,
    out,
    cos,
    sin,
    rows,
    tokens,
    H: tl.constexpr,
    D2: tl.constexpr,
    INVERSE: tl.constexpr,
    HALVES: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    row = tl.program_id(0) * T + tl.arange(0, T)
    known = row < rows
    c, s = _angles(cos, sin, row % tokens, known, D2, C)
    if INVERSE:
        _turn(x, out, c, -s, row, known, H * 2 * D2, H * 2 * D2, H, D2, HEADS, C, T, FROM_HALVES=HALVES)
    else:
        _turn(x, out, c, s, row, known, H * 2 * D2, H * 2 * D2, H, D2, HEADS, C, T, TO_HALVES=HALVES)


@triton.jit
def _rotate_heads(
    heads,
    q,
    k,
    v,
    cos,
    sin,
    rows,
    INVERSE: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D2: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """From ``heads`` to the others; INVERSE: back from these, turned back."""
    row = tl.program_id(0) * T + tl.arange(0, T)
    known = row < rows
    c, s = _angles(cos, sin, row, known, D2, C)
    D: tl.constexpr = 2 * D2
    ALL: tl.constexpr = (HQ + 2 * HK) * D
    if INVERSE:
        _turn(q, heads, c, -s, row, known, HQ * D, ALL, HQ, D2, QUERIES, C, T)
        _turn(k, heads + HQ * D, c, -s, row, known, HK * D, ALL, HK, D2, KEYS, C, T)
        _copy(v, heads + (HQ + HK) * D, row, known, HK * D, ALL, HK, D2, KEYS, C)
    else:
        _turn(heads, q, c, s, row, known, ALL, HQ * D, HQ, D2, QUERIES, C, T)
        _turn(heads + HQ * D, k, c, s, row, known, ALL, HK * D, HK, D2, KEYS, C, T)
        _copy(heads + (HQ + HK) * D, v, row, known, ALL, HK * D, HK, D2, KEYS, C)
