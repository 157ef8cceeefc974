"""Output heads whose vocabulary is dealt out over tensor-parallel ranks, and their cross-entropy.

Shape legend: m rows, D width, V vocabulary, v rows of it on this rank without padding, C rows of a chunk,
R ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from rxt_dist.kernels.cross_entropy import ProjectionGradients, project, scaled_gradients
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton
from rxt_dist.model.canonical import Cut
from rxt_dist.model.heads import CROSS_ENTROPY_CHUNK, LMHead, Loss, MLMHead
from rxt_dist.model.initialisation import Distribution, linear_default
from rxt_dist.parallel.regions import gathered, joined, slice_of, summed
from rxt_dist.parallel.tensor_layers import TensorRank, real_rows, vocabulary_part

if HAS_TRITON:
    from rxt_dist.kernels import cross_entropy_triton


class _VocabHead(nn.Module):
    """Weight and bias of the rows of the vocabulary that this rank holds; behind them padding, all zeros."""

    weight: Any
    bias: Any

    def hold(self, weight: torch.Tensor, tensor: TensorRank) -> None:
        """Take the place of a head with ``weight`` [V, D]."""
        self._vocabulary, width = weight.shape
        self._rows, self._tensor = vocabulary_part(self._vocabulary, tensor), tensor
        self._keeps_slice = tensor.sliced is not None
        self.weight = nn.Parameter(torch.empty(len(self._rows), width, device=weight.device))
        self.bias = nn.Parameter(torch.empty(len(self._rows), device=weight.device))

    def cuts(self) -> dict[str, list[Cut]]:
        held = real_rows(self._vocabulary, self._rows)
        return {
            "weight": [Cut.along(0, (self._vocabulary, self.weight.shape[1]), held)],
            "bias": [Cut.along(0, (self._vocabulary,), held)],
        }

    def initial_distributions(self) -> dict[str, Distribution]:
        return dict.fromkeys(("weight", "bias"), linear_default(self.weight.shape[1]))

    def loss(self, features: torch.Tensor, targets: torch.Tensor) -> Loss:
        """Of rows [m, D], which all ranks have, and int64 targets [m]."""
        held, group = real_rows(self._vocabulary, self._rows), self._tensor.ranks
        loss, correct = _VocabCrossEntropy.apply(  # type: ignore[no-untyped-call]
            features, self.weight, self.bias, targets, CROSS_ENTROPY_CHUNK, held, group, self._keeps_slice
        )
        return loss, correct


class TensorLMHead(_VocabHead, LMHead):
    """Some rows of an LM head. All logits [m, V] come without gradient."""

    def __init__(self, whole: LMHead, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.hold(whole.weight, tensor)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor | Loss:  # type: ignore[override]
        if targets is not None:
            return self.loss(hidden, targets)
        own = F.linear(hidden, self.weight, self.bias)
        parts = gathered(own.detach(), self._tensor.ranks)
        return parts.transpose(0, 1).flatten(1)[:, : self._vocabulary]


class TensorMLMHead(_VocabHead, MLMHead):
    """An MLM head with some rows of its vocabulary."""

    def __init__(self, whole: MLMHead, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        self.dense, self.norm = whole.dense, whole.norm
        self.hold(whole.weight, tensor)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor | Loss:
        features: torch.Tensor = super().forward(hidden)  # type: ignore[assignment]
        return features if targets is None else self.loss(features, targets)


class _VocabCrossEntropy(torch.autograd.Function):
    """What :func:`rxt_dist.kernels.cross_entropy.linear_cross_entropy` gives, each rank with its logits.

    Ranks exchange four numbers a row, once for all chunks: the logarithm of their sum of exponentials, the
    target's logit, the largest logit, and whether that is the target's. So the gradient of logits has to
    wait for all chunks, and the backward pass makes them again. With ``keeps_slice`` each rank keeps its
    slice of the rows until then and gathers the others again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        held: range,
        group: dist.ProcessGroup,
        keeps_slice: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.empty(4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(held))
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = project(hidden[part], weight[: len(held)], bias[: len(held)], buffer)
            _own_numbers(logits, targets[part], held, own[:, part])
        normalisers, wanted, best, hits = gathered(own, group).unbind(1)  # [R, m] each
        normaliser = normalisers.logsumexp(dim=0)
        ctx.chunk, ctx.held, ctx.group, ctx.keeps_slice = chunk, held, group, keeps_slice
        kept = hidden[slice_of(len(hidden), group)].clone() if keeps_slice else hidden
        ctx.save_for_backward(kept, weight, bias, targets, normaliser)
        # Of equal logits the first one counts, as in a whole vocabulary.
        correct = hits.gather(0, best.max(dim=0, keepdim=True).indices).sum().long()
        ctx.mark_non_differentiable(correct)
        return (normaliser - wanted.sum(dim=0)).sum(), correct

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None, None, None, None]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        if ctx.keeps_slice:
            hidden = joined(hidden, len(targets), ctx.group)
        gradients = ProjectionGradients(hidden, weight, ctx.needs_input_grad[:3])
        count = len(ctx.held)
        buffer = hidden.new_empty(min(ctx.chunk, len(hidden)), count)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = project(hidden[part], weight[:count], bias[:count], buffer)
            gradients.add(part, _logit_gradient(logits, targets[part], ctx.held, normaliser[part]))
        sums = gradients.hidden, gradients.parameters
        kept = ctx.needs_input_grad[:3], hidden.shape[1], weight.dtype
        of_hidden, of_weight, of_bias = scaled_gradients(*sums, grads[0], *kept)
        if of_hidden is not None:
            of_hidden = summed(of_hidden, ctx.group)
        return of_hidden, of_weight, of_bias, None, None, None, None, None


def _own_numbers(logits: torch.Tensor, targets: torch.Tensor, held: range, out: torch.Tensor) -> None:
    """Write the four numbers of :class:`_VocabCrossEntropy` into ``out`` [4, C]."""
    if held and uses_triton(logits):
        cross_entropy_triton.score_parts(logits, targets, held.start, out)
        return
    out[0].fill_(-torch.inf)
    out[1].zero_()
    out[2].fill_(-torch.inf)
    out[3].zero_()
    if not held:
        return
    exact = logits.float()
    column, is_here = _column_of(targets, held)
    best, guess = exact.max(dim=1)
    out[1] = torch.where(is_here, exact.gather(1, column), 0.0).squeeze(1)
    out[2] = best
    out[3] = (is_here & (guess[:, None] == column)).squeeze(1)
    out[0] = exact.sub_(best[:, None]).exp_().sum(dim=1).log_().add_(best)


def _logit_gradient(
    logits: torch.Tensor, targets: torch.Tensor, held: range, normaliser: torch.Tensor
) -> torch.Tensor:
    """Gradient of the summed loss with respect to ``logits`` [C, v], which are overwritten."""
    if held and uses_triton(logits):
        cross_entropy_triton.put_gradient_of_part(logits, targets, held.start, normaliser)
        return logits
    gradient = logits.float().sub_(normaliser[:, None]).exp_()
    column, is_here = _column_of(targets, held)
    if held:
        gradient.scatter_add_(1, column, -is_here.to(gradient.dtype))
    return gradient.to(logits.dtype)


def _column_of(targets: torch.Tensor, held: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The column [C, 1] of every target among the rows ``held``, 0 if it is not, and whether it is."""
    column = (targets - held.start)[:, None]
    is_here = (column >= 0) & (column < len(held))
    return column.clamp(0, max(0, len(held) - 1)), is_here
