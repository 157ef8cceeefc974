"""Routing in one kernel a pass: softmax, the K largest, their weights; and the gradient of all of it.

Shape legend: N tokens, E experts, K experts a token visits, C columns, T tokens of a program.
"""

# ruff: noqa: N803 - constants of kernels
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_NUMBERS = 512  # of a warp
_LOWEST = tl.constexpr(-(2**31))
_LOW_BITS = tl.constexpr(2**13)  # what bf16 and fp16 leave 0 in fp32


def route(
    logits: torch.Tensor, selection_bias: torch.Tensor | None, num_experts: int, top_k: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``top_k`` experts of largest probability, or largest sum of probability and bias.

    Args:
        logits: [N, C], of which the first E columns count; gradients of the others are zeros.
        selection_bias: fp32 [E], or None; no gradient flows to it.
        eps: added to the sum by which the chosen probabilities are divided.

    Returns:
        (weights fp32 [N, K]; experts int64 [N, K], largest first, the lowest of equals first, distinct and in
        range whatever the logits are, NaN too; probability of the chosen experts together, fp32 [N]).
    """
    weights, experts, mass = _Route.apply(  # type: ignore[no-untyped-call]
        logits, selection_bias, num_experts, top_k, eps
    )
    return weights, experts, mass


def _sizes(stride: int, experts: int, top_k: int) -> dict[str, int]:
    columns = 1 << (stride - 1).bit_length()
    slots = 1 << (top_k - 1).bit_length()
    warps = 4 if columns <= 128 else 1  # a row within a warp: no sum waits for another one
    tokens = max(1, warps * _NUMBERS // columns)
    return {
        "E": experts,
        "K": top_k,
        "STRIDE": stride,
        "COLUMNS": columns,
        "SLOTS": slots,
        "T": tokens,
        "num_warps": warps,
    }


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        selection_bias: torch.Tensor | None,
        num_experts: int,
        top_k: int,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = logits.contiguous()
        tokens = logits.shape[0]
        weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
        experts = logits.new_empty(tokens, top_k, dtype=torch.int64)
        mass = logits.new_empty(tokens, dtype=torch.float32)
        sizes = _sizes(logits.shape[1], num_experts, top_k)
        _choose[(max(1, -(-tokens // sizes["T"])),)](
            logits, selection_bias, weights, experts, mass, tokens, EPS=eps, **sizes
        )
        ctx.save_for_backward(logits, experts)
        ctx.num_experts, ctx.eps = num_experts, eps
        ctx.mark_non_differentiable(experts)
        return weights, experts, mass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        logits, experts = ctx.saved_tensors
        tokens = logits.shape[0]
        out = torch.empty_like(logits)
        sizes = _sizes(logits.shape[1], ctx.num_experts, experts.shape[1])
        _choose_backward[(max(1, -(-tokens // sizes["T"])),)](
            logits, experts, grads[0].contiguous(), grads[2].contiguous(), out, tokens, EPS=ctx.eps, **sizes
        )
        return out, None, None, None, None


@triton.jit
def _logits(logits, row, column, tokens, E: tl.constexpr, STRIDE: tl.constexpr):
    """fp32 [T, COLUMNS]: rows beyond ``tokens`` are zeros, columns beyond E minus infinity."""
    # All columns are read, as many of them at once as their number can be divided by.
    real = (row < tokens)[:, None] & (column < STRIDE)[None, :]
    x = tl.load(logits + row[:, None].to(tl.int64) * STRIDE + column[None, :], mask=real, other=0.0)
    return tl.where((column < E)[None, :], x.to(tl.float32), float("-inf"))


@triton.jit
def _ordered(x):
    """Integers in the order of fp32 ``x``; unlike these they are ordered, and equal themselves, if they are
    NaN. None is near the lowest integer."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.maximum(tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _LOWEST + _LOW_BITS)


@triton.jit
def _probabilities(logits, row, expert, real, largest, norm, STRIDE: tl.constexpr):
    """Of the ``expert`` s [T, SLOTS] of each row; 0 where they are not ``real``."""
    x = tl.load(logits + row[:, None].to(tl.int64) * STRIDE + expert, mask=real, other=0.0).to(tl.float32)
    return tl.where(real, tl.exp(x - largest[:, None]) * norm[:, None], 0.0)


@triton.jit
def _choose(
    logits,
    selection_bias,
    weights,
    experts,
    mass,
    tokens,
    EPS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    T: tl.constexpr,
):
    row = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.arange(0, COLUMNS)
    slot = tl.arange(0, SLOTS)
    x = _logits(logits, row, column, tokens, E, STRIDE)
    largest = tl.max(x, 1)
    powers = tl.exp(x - largest[:, None])
    norm = 1.0 / tl.sum(powers, 1)
    # Logits of 16 bits leave room in their fp32 for the column, and lie in the order of the probabilities.
    packed: tl.constexpr = selection_bias is None and logits.dtype.element_ty.primitive_bitwidth == 16
    if packed:
        key = _ordered(x) & -_LOW_BITS | (COLUMNS - 1 - column)[None, :]
    elif selection_bias is None:
        key = _ordered(powers * norm[:, None])
    else:
        bias = tl.load(selection_bias + column, mask=column < E, other=0.0)
        key = _ordered(powers * norm[:, None] + bias[None, :])
    key = tl.where((column < E)[None, :], key, _LOWEST)

    chosen = tl.zeros([T, SLOTS], tl.int32)
    for k in tl.static_range(K):
        best = tl.max(key, 1)
        if packed:
            expert = COLUMNS - 1 - (best & _LOW_BITS - 1)
            key = tl.where(key == best[:, None], _LOWEST, key)
        else:
            expert = tl.min(tl.where(key == best[:, None], column[None, :], COLUMNS), 1)
            key = tl.where(column[None, :] == expert[:, None], _LOWEST, key)
        chosen = tl.where((slot == k)[None, :], expert[:, None], chosen)

    known = row < tokens
    real = known[:, None] & (slot < K)[None, :]
    top = _probabilities(logits, row, chosen, real, largest, norm, STRIDE)
    total = tl.sum(top, 1)
    place = row[:, None].to(tl.int64) * K + slot[None, :]
    tl.store(weights + place, top / (total + EPS)[:, None], mask=real)
    tl.store(experts + place, chosen.to(tl.int64), mask=real)
    tl.store(mass + row, total, mask=known)


@triton.jit
def _choose_backward(
    logits,
    experts,
    grad_weights,
    grad_mass,
    grad_logits,
    tokens,
    EPS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    T: tl.constexpr,
):
    """With the chosen p_k, m = sum_k p_k and w_k = p_k / (m + eps):
    dL/dp_k = (g_k - sum_j g_j w_j) / (m + eps) + dL/dm, and from there through the softmax."""
    row = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.arange(0, COLUMNS)
    slot = tl.arange(0, SLOTS)
    known = row < tokens
    x = _logits(logits, row, column, tokens, E, STRIDE)
    largest = tl.max(x, 1)
    x = tl.exp(x - largest[:, None])
    norm = 1.0 / tl.sum(x, 1)

    first = row.to(tl.int64) * K
    place = first[:, None] + slot[None, :]
    real = known[:, None] & (slot < K)[None, :]
    expert = tl.load(experts + place, mask=real, other=0)
    chosen = _probabilities(logits, row, expert, real, largest, norm, STRIDE)
    slope = tl.load(grad_weights + place, mask=real, other=0.0)
    scale = 1.0 / (tl.sum(chosen, 1) + EPS)
    shift = tl.load(grad_mass + row, mask=known, other=0.0) - tl.sum(slope * chosen, 1) * scale * scale
    mean = tl.sum((slope * scale[:, None] + shift[:, None]) * chosen, 1)

    shift -= mean
    grad = tl.zeros([T, COLUMNS], tl.float32) - mean[:, None]
    for k in tl.static_range(K):
        one = tl.load(experts + first + k, mask=known, other=0).to(tl.int32)
        slope = tl.load(grad_weights + first + k, mask=known, other=0.0)
        grad = tl.where(column[None, :] == one[:, None], (slope * scale + shift)[:, None], grad)
    grad *= x * norm[:, None]
    spot = row[:, None].to(tl.int64) * STRIDE + column[None, :]
    tl.store(
        grad_logits + spot,
        grad.to(grad_logits.dtype.element_ty),
        mask=known[:, None] & (column < STRIDE)[None, :],
    )
