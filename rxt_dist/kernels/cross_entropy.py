"""Output projection and cross-entropy in one, over chunks of rows, so that logits never live whole.

Shape legend: m rows, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rxt_dist.kernels.compilation import compiled_kernel


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of ``softmax(hidden @ weight.T + bias)`` and the number of correct rows.

    Logits exist for ``chunk`` rows at a time, in the dtype of ``hidden`` as an output projection would
    give them; softmax and sums are fp32. The backward computes them again instead of keeping them.

    Args:
        hidden: [m, D]; weight: [V, D]; bias: [V] or None; targets: int64 [m], each in [0, V).
        chunk: rows C whose logits live at once.

    Returns:
        (loss sum, fp32 scalar; rows whose largest logit is the target, int64 scalar, no gradient).
        With m = 0 both are 0, and the inputs get gradients of zeros.
    """
    loss, correct = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk)  # type: ignore[no-untyped-call]
    return loss, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        normalisers = []
        for start in range(0, hidden.shape[0], chunk):
            rows, target = hidden[start : start + chunk], targets[start : start + chunk]
            normaliser, wanted, hits = _scores(rows, weight, bias, target)
            loss += (normaliser - wanted).sum()
            correct += hits
            normalisers.append(normaliser)
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, bias, targets, *normalisers)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, bias, targets, *normalisers = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # Parameter gradients add up over chunks in fp32: bf16 would drop what late chunks contribute.
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for index, normaliser in enumerate(normalisers):
            part = slice(index * ctx.chunk, (index + 1) * ctx.chunk)
            rows, target = hidden[part], targets[part]
            gradient, bias_part = _logit_gradient(rows, weight, bias, target, normaliser, grads[0])
            if grad_bias is not None:
                grad_bias += bias_part
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, gradient, rows)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
            None,
        )


def _add_product(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None:
    """``total += gradient.T @ rows``, total in fp32."""
    if rows.dtype == total.dtype:
        total.addmm_(gradient.T, rows)
    else:
        total += gradient.T @ rows


@compiled_kernel
def _scores(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log of the sum of exponentials and target logit, fp32 [C] each, and how many rows are correct."""
    logits = F.linear(rows, weight, bias).float()
    best, guess = logits.max(dim=1)
    wanted = logits.gather(1, target[:, None]).squeeze(1)
    normaliser = logits.sub_(best[:, None]).exp_().sum(dim=1).log_().add_(best)
    return normaliser, wanted, (guess == target).sum()


@compiled_kernel
def _logit_gradient(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    normaliser: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the logits [C, V] in the dtype of ``rows``, and fp32 [V] its sum over rows."""
    gradient = F.linear(rows, weight, bias).float().sub_(normaliser[:, None]).exp_()
    if torch.compiler.is_compiling():  # fuses with what surrounds it, as a scatter would not
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        gradient = gradient - (columns == target[:, None]).float()
    else:
        gradient.scatter_add_(1, target[:, None], gradient.new_full((target.shape[0], 1), -1.0))
    gradient = gradient.mul_(grad)
    return gradient.to(rows.dtype), gradient.sum(dim=0)
