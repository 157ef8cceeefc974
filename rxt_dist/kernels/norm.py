"""RMSNorm (Zhang and Sennrich, 2019), computed in fp32 whatever the dtype of its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels.norm_triton import WIDEST, norm_backward

RMS_EPS = torch.finfo(torch.float32).eps
"""Added to the mean square, also for bf16 inputs: 1.1920929e-07."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = RMS_EPS) -> torch.Tensor:
    """``weight * x / sqrt(mean(x²) + eps)`` over the last dimension.

    Args:
        x: [..., D]; weight: [D].

    Returns:
        [..., D] in the dtype of ``x``.
    """
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if plain and not torch.compiler.is_compiling():
        out: torch.Tensor = _CpuRmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_branch(
    x: torch.Tensor, weight: torch.Tensor, eps: float = RMS_EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` and ``rms_norm(x)``, of [..., D], for a residual stream: both gradients meet in one pass."""
    if uses_triton(x) and x.numel() and x.shape[-1] <= WIDEST:
        stream, normed = _Branch.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return stream, normed
    return x, rms_norm(x, weight, eps)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return x.view_as(x), F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad = grads[0].reshape(-1, x.shape[-1]), grads[1].reshape(-1, x.shape[-1])
        found, grad_weight = norm_backward(
            grad.contiguous(),
            grad_x.contiguous(),
            x.reshape(-1, x.shape[-1]).contiguous(),
            weight,
            ctx.eps,
            ctx.needs_input_grad[1],
        )
        return found.view(x.shape), grad_weight, None


class _CpuRmsNorm(torch.autograd.Function):
    """PyTorch has no fused CPU backward for RMSNorm; this borrows LayerNorm's, three times as fast.

    LayerNorm's input gradient with mean 0 and the RMS as deviation has one term too much,
    ``-rms⁻¹ · mean(grad · weight)``, which is added back.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: torch.Tensor = (x * inverse).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grads[0], x, [width], torch.zeros_like(inverse), inverse, weight, None, wanted
        )
        if grad_x is not None:
            excess = (grads[0] @ weight).div_(width).unsqueeze(-1)
            grad_x = grad_x.addcmul_(inverse, excess)
        return grad_x, grad_weight, None
