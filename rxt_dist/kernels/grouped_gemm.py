"""One matrix product for each group of rows: the experts of a mixture in one call.

Shape legend: n rows sorted by group, E groups, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_ALIGNMENT = 16  # bytes: grouped_mm refuses rows whose stride is not a multiple of this


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``y[i] = weight[e] @ x[i]`` for the rows i of group e.

    Args:
        x: [n, I], rows sorted by group; weight: [E, O, I] of the same dtype.
        offsets: int32 [E], the end of each group; ``offsets[-1] <= n`` (rows beyond it are undefined).

    Returns:
        [n, O]. Groups may be empty; their weight gradient is exact zeros.
    """
    out: torch.Tensor = _GroupedLinear.apply(x, weight, offsets)  # type: ignore[no-untyped-call]
    return out


def add_group_bias(
    x: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor, group_of_row: torch.Tensor
) -> torch.Tensor:
    """``y[i] = x[i] + bias[group_of_row[i]]``.

    Args:
        x: [n, O], rows sorted by group; bias: [E, O] of the same dtype; group_of_row: int64 [n].
        offsets: int32 [E], the end of each group; ``offsets[-1] == n``.

    Returns:
        [n, O]. The bias gradient adds up the rows of a group without atomic additions.
    """
    out: torch.Tensor = _AddGroupBias.apply(x, bias, offsets, group_of_row)  # type: ignore[no-untyped-call]
    return out


def _fits_grouped_mm(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether grouped_mm takes rows of ``sizes`` elements."""
    if not hasattr(F, "grouped_mm") or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * dtype.itemsize % _ALIGNMENT == 0 for size in sizes)


def _ends(offsets: torch.Tensor) -> list[tuple[int, int]]:
    """(start, end) of each group; on CUDA this waits for the device, only where grouped_mm cannot run."""
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


class _GroupedLinear(torch.autograd.Function):
    """Own backward: grouped_mm takes no expanded (stride 0) gradient and leaves zero rows undefined."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.native = _fits_grouped_mm(x.dtype, *weight.shape[1:])
        if x.shape[0] == 0:
            return x.new_zeros(0, weight.shape[1])
        if ctx.native:
            return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offsets)
        return torch.cat([x[a:b] @ w.T for (a, b), w in zip(_ends(offsets), weight, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        if x.shape[0] == 0:
            return torch.zeros_like(x), torch.zeros_like(weight), None
        if ctx.native:
            grad_x = F.grouped_mm(grad, weight, offs=offsets) if need_x else None
            grad_w = F.grouped_mm(grad.T, x.contiguous(), offs=offsets) if need_weight else None
            return grad_x, grad_w, None
        ends = _ends(offsets)
        grad_x = (
            torch.cat([grad[a:b] @ w for (a, b), w in zip(ends, weight, strict=True)]) if need_x else None
        )
        grad_w = torch.stack([grad[a:b].T @ x[a:b] for a, b in ends]) if need_weight else None
        return grad_x, grad_w, None


class _AddGroupBias(torch.autograd.Function):
    """Own backward: compiled code would add every row to its group's sum atomically."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor, group_of_row: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(bias, offsets, group_of_row)
        return x + F.embedding(group_of_row, bias)

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        bias, offsets, group_of_row = ctx.saved_tensors
        grad = grads[0].contiguous()
        sums = _group_sums(grad, bias, offsets, group_of_row) if ctx.needs_input_grad[1] else None
        return grad, sums, None, None


def _group_sums(
    grad: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor, group_of_row: torch.Tensor
) -> torch.Tensor:
    """Sum of the rows of each group, [E, O]."""
    if grad.shape[0] == 0:
        return torch.zeros_like(bias)
    if grad.dtype.itemsize < 4 and _fits_grouped_mm(grad.dtype, grad.shape[1]):
        # A product with ones, accumulated in fp32; as many of them as the alignment asks for. They stand on
        # the right: transposed, the compiler would lay them out anew, in rows of any length.
        ones = grad.new_ones(grad.shape[0], _ALIGNMENT // grad.element_size())
        return F.grouped_mm(grad.T, ones, offs=offsets)[:, :, 0]
    sums: torch.Tensor = torch.ops.aten.embedding_dense_backward(
        grad.to(torch.promote_types(grad.dtype, torch.float32)), group_of_row, bias.shape[0], -1, False
    )
    return sums.to(bias.dtype)
