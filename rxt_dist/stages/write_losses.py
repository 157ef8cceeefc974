"""Losses of a memory write: how far the memory is from a label, and how much of it changed.

Shape legend: L layers, B lanes, S STM slots, N tokens, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rxt_dist.kernels.compilation import compiled
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.randomness import normal_tensor

if HAS_TRITON:
    from rxt_dist.kernels.write_losses_triton import losses_backward, losses_forward

COSINE_EPS = 1e-8


def write_losses(
    after: torch.Tensor,
    before: torch.Tensor,
    layers: torch.Tensor,
    weights: torch.Tensor,
    factors: torch.Tensor,
    layout: SequenceLayout,
    present: torch.Tensor,
    noise: torch.Tensor | None,
    level: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the lanes of what a write made of the STM ``before``.

    Slot s of a lane belongs to the token at position s. Its label is ``(1 - w) * before + w * encoding`` with
    the lane's weight w, and noise. Labels have no gradient.

    Args:
        after, before: fp32 [L, B, S, D]; layers: [L, N, D], the encoding; weights: fp32 [B].
        factors: fp32 [B], of the second loss; layout: the B sequences of the N tokens.
        present: bool [B], lanes that the first loss counts.
        noise: int64 [L, N], keys of normal numbers with standard deviation ``level`` that are added to the
            labels; None for no noise.

    Returns:
        The negative cosine between slot and label, mean over layers, summed over slots that have a token; and
        the mean square of what changed in each lane, times its factor, summed. fp32 scalars.
    """
    if uses_triton(after) and after.numel():
        inputs = (layers, weights, factors, layout.cu_seqlens, present, noise)
        both: torch.Tensor = _WriteLosses.apply(after, before, level, *inputs)  # type: ignore[no-untyped-call]
        distance, difference = both.unbind()
        return distance, difference
    lanes, positions = layout.sequence_ids, layout.positions
    labels = before.detach()
    distance = _token_distance(after, labels, layers, weights, lanes, positions, present, noise, level)
    return distance, _difference(after, before, factors)


class _WriteLosses(torch.autograd.Function):
    """Nothing but the inputs is kept: the backward pass has to read them anyway."""

    @staticmethod
    def forward(
        ctx: Any, after: torch.Tensor, before: torch.Tensor, level: float, *others: torch.Tensor | None
    ) -> torch.Tensor:
        inputs: Any = [None if x is None else x.contiguous() for x in (after, before, *others)]
        ctx.save_for_backward(*inputs)
        ctx.level = level
        out: torch.Tensor = losses_forward(level, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_before = ctx.needs_input_grad[1]
        grad = grads[0].contiguous()
        found = losses_backward(ctx.level, of_before, grad, *ctx.saved_tensors)
        return *found, *(None for _ in ctx.needs_input_grad[2:])


@compiled
def _difference(after: torch.Tensor, before: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return ((after - before) ** 2).mean(dim=(0, 2, 3)).mul(factors).sum()


@compiled
def _token_distance(
    after: torch.Tensor,
    before: torch.Tensor,
    layers: torch.Tensor,
    weights: torch.Tensor,
    lanes: torch.Tensor,
    positions: torch.Tensor,
    present: torch.Tensor,
    noise: torch.Tensor | None,
    level: float,
) -> torch.Tensor:
    """Lane, position and noise keys of every token."""
    slots = positions.clamp(max=after.shape[2] - 1)
    new = weights[lanes].unsqueeze(-1)
    label = (1.0 - new) * before[:, lanes, slots] + new * layers.to(before.dtype)
    if noise is not None:
        label = label + normal_tensor(noise, label.shape[-1]) * level
    cosine = F.cosine_similarity(after[:, lanes, slots], label, dim=-1, eps=COSINE_EPS)
    counted = (positions < after.shape[2]) & present[lanes]
    return -torch.where(counted, cosine, 0.0).mean(dim=0).sum()
