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
        offsets: int32 [E], the end of each group; ``offsets[-1] == n`` (rows beyond it are undefined).

    Returns:
        [n, O]. Groups may be empty; their weight gradient is exact zeros.
    """
    out: torch.Tensor = _GroupedLinear.apply(x, weight, offsets)  # type: ignore[no-untyped-call]
    return out


def _fits_grouped_mm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if not hasattr(F, "grouped_mm") or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * x.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])


def _ends(offsets: torch.Tensor) -> list[tuple[int, int]]:
    """(start, end) of each group; on CUDA this waits for the device, only where grouped_mm cannot run."""
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


class _GroupedLinear(torch.autograd.Function):
    """Own backward: grouped_mm takes no expanded (stride 0) gradient and leaves zero rows undefined."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.native = _fits_grouped_mm(x, weight)
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
