"""Rows of experts back into their tokens.

Shape legend: N tokens, K rows of a token, n = N * K rows sorted by expert, E experts, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.kernels.grouped_gemm import add_group_bias
from rxt_dist.kernels.permute import add_permuted
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels.combine_triton import combine_backward, combine_forward


def combine_rows(
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    expert_of_row: torch.Tensor,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[t] = sum_k weights[t, k] * (rows[i] + bias[expert_of_row[i]])``, i = ``inverse[t * K + k]``.

    Args:
        rows: [n, D], sorted by expert; bias: [E, D] of the same dtype, or None; weights: [N, K], fp32 where
            ``rows`` has fewer bits.
        order: int64 [n], row i belongs to slot ``order[i]`` of the flattened [N, K].
        inverse: int64 [N * K], the row of each slot; -1: it has none, adds nothing, and the gradient of its
            weight is 0.
        offsets: int32 [E], the end of each expert's rows; expert_of_row: int64 [n]. ``offsets[-1] == n``, or
            less where Triton's kernels run: rows behind belong to nobody, and have no gradient.
        base: [N, D] of the dtype of ``rows``, added to the sums, or None.

    Returns:
        [N, D] in the dtype of ``rows``. Gradients are sums in the same order every time; the bias of an
        expert without rows gets exact zeros.
    """
    if uses_triton(rows) and rows.shape[0]:
        out: torch.Tensor = _CombineRows.apply(  # type: ignore[no-untyped-call]
            rows, bias, weights, order, inverse, offsets, expert_of_row, base
        )
        return out
    if bias is not None:
        rows = add_group_bias(rows, bias, offsets, expert_of_row)
    slots = add_permuted(rows, order, inverse, 1).view(*weights.shape, rows.shape[1])
    combined: torch.Tensor = (slots * weights.to(rows.dtype)[..., None]).sum(dim=1)
    return combined if base is None else base + combined


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        weights: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        offsets: torch.Tensor,
        expert_of_row: torch.Tensor,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = rows.contiguous()
        bias = None if bias is None else bias.contiguous()
        weights = weights.contiguous()
        kept = rows if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(order, offsets, bias, weights, kept)
        base = None if base is None else base.contiguous()
        return combine_forward(rows, bias, weights, inverse, expert_of_row, weights.shape[1], base)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, offsets, bias, weights, rows = ctx.saved_tensors
        grad_rows, grad_weights, grad_bias = combine_backward(
            grads[0].contiguous(), rows, bias, weights, order, offsets, ctx.needs_input_grad[1]
        )
        of_base = grads[0] if ctx.needs_input_grad[7] else None
        return grad_rows, grad_bias, grad_weights, None, None, None, None, of_base
