"""Output projection and cross-entropy in one, over chunks of rows, so that logits never live whole.

The gradient of a chunk's logits is computed as soon as they are there, in their place, and multiplied into
the gradients of rows and parameters: logits are made once, and the backward pass only scales (Hsu et al.,
2024, https://arxiv.org/abs/2410.10989).

Shape legend: m rows, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch._compile import _disable_dynamo

from rxt_dist.kernels.compilation import compiled_kernel
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels import cross_entropy_triton

_ONES = 8
"""Columns of ones beside the rows: their product is the bias' gradient. GPUs like multiples of 8."""
_MULTIPLE = 1024
Wanted = tuple[bool, bool, bool]
"""Which gradients somebody asks for: of hidden, weight and bias."""
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

_repeated = False


@contextmanager
def repeated_later() -> Iterator[None]:
    """Inside, losses compute no gradients yet: recomputation runs the pass again."""
    global _repeated
    before, _repeated = _repeated, True
    try:
        yield
    finally:
        _repeated = before


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of ``softmax(hidden @ weight.T + bias)`` and the number of correct rows.

    Logits exist for ``chunk`` rows at a time, in the dtype of ``hidden`` as an output projection would
    give them, and their gradient in that dtype too; softmax and sums are fp32. While gradients are recorded,
    the forward pass computes those of the sum and keeps them, of ``hidden`` in its dtype and of the
    parameters in fp32. The backward pass multiplies by the gradient it is given, which rounds that of
    ``hidden`` a second time.

    Args:
        hidden: [m, D]; weight: [V, D]; bias: [V] or None; targets: int64 [m], each in [0, V).
        chunk: rows C whose logits live at once.

    Returns:
        (loss sum, fp32 scalar; rows whose largest logit, the first of equal ones, is the target's, int64
        scalar, no gradient). With m = 0 both are 0, and the inputs get gradients of zeros.
    """
    records = torch.is_grad_enabled()  # never inside of an autograd function
    loss, correct = _apply(hidden, weight, bias, targets, chunk, records)
    return loss, correct


def parts(rows: int, chunk: int) -> Iterator[tuple[slice, int]]:
    """Slices of ``rows``, at most ``chunk`` each, and how many rows of each the slice before it has too.

    The last one begins early enough to have a multiple of 1024 rows, or ``chunk``. Masked rows are another
    number in every step; for products of another size cuBLAS takes other kernels, and a new one is loaded
    only when the device has done everything, which then waits for the host.
    """
    for start in range(0, rows, chunk):
        end = min(rows, start + chunk)
        wanted = min(chunk, -(-(end - start) // _MULTIPLE) * _MULTIPLE)
        begin = end - wanted if wanted <= end else start
        yield slice(begin, end), start - begin


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
        records: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted: Wanted = tuple(records and need for need in ctx.needs_input_grad[:3])  # type: ignore[assignment]
        gradients = ProjectionGradients(hidden, weight, wanted)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        hits = torch.empty(len(hidden), dtype=torch.int32, device=hidden.device)
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for part, repeated in parts(len(hidden), chunk):
            logits = project(hidden[part], weight, bias, buffer)
            multiplies = any(wanted) and not _repeated
            gradient = _score_rows(logits, targets[part], losses[part], hits[part], multiplies)
            if gradient is not None:
                gradients.add(part, gradient, repeated)
        ctx.kept = wanted, hidden.shape[1], weight.dtype
        ctx.save_for_backward(gradients.hidden, gradients.parameters)
        correct = hits.sum()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, parameters = ctx.saved_tensors
        return (*scaled_gradients(hidden, parameters, grads[0], *ctx.kept), None, None, None)


# torch.compile does not know products in another dtype than that of their factors. torch.compiler.disable
# would load the compiler here, which takes seconds, also in commands that compute nothing.
@_disable_dynamo
def _apply(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class ProjectionGradients:
    """Gradients of what logits are projected from, collected chunk by chunk.

    Args:
        hidden: [m, D]; weight: [V, D].

    Attributes:
        hidden: [m, D], that of ``hidden`` in its dtype, or None.
        parameters: fp32 [V, D + 8], that of the weight beside equal columns of the bias', or one of the two,
            or None. Sums over chunks are fp32: bf16 would drop what late chunks contribute.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, wanted: Wanted) -> None:
        of_hidden, of_weight, of_bias = wanted
        self._weight = weight
        self.hidden = torch.empty_like(hidden) if of_hidden else None
        self.parameters: torch.Tensor | None = None
        if of_weight or of_bias:
            rows = hidden if of_weight else hidden[:, :0]
            self._factors = F.pad(rows, (0, _ONES), value=1.0) if of_bias else rows
            width = self._factors.shape[1]
            self.parameters = torch.zeros(len(weight), width, dtype=torch.float32, device=weight.device)

    def add(self, part: slice, gradient: torch.Tensor, repeated: int = 0) -> None:
        """Take in rows ``part``, whose logits of the first V of the vocabulary have ``gradient`` [C, V]. The
        first ``repeated`` of its rows were taken in before, and are overwritten."""
        vocabulary = gradient.shape[1]
        if self.hidden is not None:
            torch.mm(gradient, self._weight[:vocabulary], out=self.hidden[part])
        if self.parameters is not None:
            gradient[:repeated] = 0  # counted before
            _add_product(self.parameters[:vocabulary], gradient.T, self._factors[part])


def project(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor
) -> torch.Tensor:
    """``rows @ weight.T + bias`` in the first rows of ``buffer``."""
    out = buffer[: len(rows)]
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``, total in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif not total.is_cuda:
        total += left @ right
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


@compiled_kernel
def scaled_gradients(
    hidden: torch.Tensor | None,
    parameters: torch.Tensor | None,
    factor: torch.Tensor,
    wanted: Wanted,
    width: int,
    dtype: torch.dtype,
) -> Gradients:
    """``factor``, an fp32 scalar, times what :class:`ProjectionGradients` has. Each is rounded once, those of
    the parameters, of ``width`` D, to ``dtype``."""
    weight = bias = None
    if hidden is not None:
        hidden = (hidden.float() * factor).to(hidden.dtype)
    if parameters is not None:
        weight = (parameters[:, :width] * factor).to(dtype) if wanted[1] else None
        bias = (parameters[:, -1] * factor).to(dtype) if wanted[2] else None
    return hidden, weight, bias


def _score_rows(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, hits: torch.Tensor, wanted: bool
) -> torch.Tensor | None:
    """Write what rows of ``logits`` [C, V] lose (fp32 [C]) and whether they hit their targets (int32 [C]).
    With ``wanted`` the gradient of the summed loss takes the place of ``logits`` and is returned."""
    if uses_triton(logits):
        cross_entropy_triton.score_rows(logits, targets, losses, hits, gradient=wanted)
        return logits if wanted else None
    losses[:], hits[:], normaliser = _scores(logits, targets)
    return _logit_gradient(logits, targets, normaliser) if wanted else None


@compiled_kernel
def _scores(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, whether the target has the largest logit, and the logarithm of the sum of exponentials; [C]."""
    exact = logits.float()
    best, guess = exact.max(dim=1)
    wanted = exact.gather(1, target[:, None]).squeeze(1)
    normaliser = exact.sub(best[:, None]).exp_().sum(dim=1).log_().add_(best)
    return normaliser - wanted, guess == target, normaliser


@compiled_kernel
def _logit_gradient(logits: torch.Tensor, target: torch.Tensor, normaliser: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed loss [C, V] in the dtype of ``logits``, which may be overwritten."""
    gradient = logits.float().sub_(normaliser[:, None]).exp_()
    if torch.compiler.is_compiling():  # fuses with what surrounds it, as a scatter would not
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        gradient = gradient - (columns == target[:, None]).float()
    else:
        gradient.scatter_add_(1, target[:, None], gradient.new_full((target.shape[0], 1), -1.0))
    return gradient.to(logits.dtype)
