"""What slots read of a memory with gated interlayer attention, without tensors of its size in between.

Shape legend: L layers, G groups of layers, B lanes, S STM slots, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rxt_dist.kernels.norm import RMS_EPS
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton
from rxt_dist.model.memory_gate import MemoryGate
from rxt_dist.model.memory_norm import MixedNorm
from rxt_dist.model.stacked import StackedRMSNorm

if HAS_TRITON:
    from rxt_dist.kernels.memory_sources_triton import (
        mixed_rows,
        mixed_rows_backward,
        norm_sums,
        weighted_rows,
    )

Norm = StackedRMSNorm | MixedNorm


class Sources(NamedTuple):
    """What :func:`normed_and_mixed` finds.

    Attributes:
        normed: [L, B * S, D], the normed memory; mixed: the same shape, its mixture with means; again:
            ``mixed`` for another reader, so that nobody adds up the gradients of both in between.
        gate: the gate's values, broadcastable to [L, B, S, 1]; sums: fp32 [L, B, S], over the memory's
            channels, without gradient.
    """

    normed: torch.Tensor
    mixed: torch.Tensor
    again: torch.Tensor
    gate: torch.Tensor
    sums: torch.Tensor


def has_kernels(stm: torch.Tensor, norms: Sequence[Norm], gates: Sequence[MemoryGate | None]) -> bool:
    """Whether kernels take these: a memory without gradient, plain norms, and gates that see mean channels or
    nothing."""
    takes = stm.dtype == torch.float32 and stm.numel() > 0 and uses_triton(stm) and not stm.requires_grad
    plain = all(isinstance(norm, StackedRMSNorm) for norm in norms)
    return takes and plain and all(gate is not None and gate.status is None for gate in gates)


def normed_and_mixed(
    stm: torch.Tensor,
    norm: Norm,
    mean_norm: Norm,
    gate: MemoryGate,
    groups: int,
    present: torch.Tensor | None,
    dtype: torch.dtype,
) -> Sources:
    """The normed memory, and its mixture by ``gate`` with the normed mean over the layers of each group.

    Args:
        stm: fp32 [L, B, S, D]; norm: of L layers; mean_norm: of one, for the means of all ``groups``.
        present: bool [B]; other lanes count as zeros, whatever they hold. None for all.
    """
    layers, lanes, slots, width = stm.shape
    weight, mean_weight = norm.weight, mean_norm.weight
    assert weight is not None
    assert mean_weight is not None
    inputs = (stm.contiguous(), weight.float(), mean_weight.float().view(width), present)
    inverse, plain, total, mean, mean_inverse, mean_total = _NormSums.apply(  # type: ignore[no-untyped-call]
        *inputs, groups
    )
    status = (total + mean_total.repeat_interleave(layers // groups, dim=0)) / width
    value = gate.value_of(status)
    shares = value.expand(layers, lanes, slots, 1).squeeze(-1).contiguous()
    offset = 0.0 if gate.config.activation == "sigmoid" else 1.0
    normed, mixed, same = _MixedRows.apply(  # type: ignore[no-untyped-call]
        *inputs, inverse, mean, mean_inverse, shares, offset, dtype
    )
    return Sources(normed, mixed, same, value, plain)


class _NormSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stm: torch.Tensor,
        weight: torch.Tensor,
        mean_weight: torch.Tensor,
        present: torch.Tensor | None,
        groups: int,
    ) -> tuple[torch.Tensor, ...]:
        inverse, plain, total, mean, mean_inverse, mean_total = norm_sums(
            stm, weight, mean_weight, present, groups, RMS_EPS
        )
        ctx.save_for_backward(stm, present, inverse, mean, mean_inverse)
        ctx.mark_non_differentiable(inverse, plain, mean, mean_inverse)
        return inverse, plain, total, mean, mean_inverse, mean_total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        stm, present, inverse, mean, mean_inverse = ctx.saved_tensors
        grad_weight = weighted_rows(stm, grads[2] * inverse, present)
        grad_mean_weight = weighted_rows(mean, grads[5] * mean_inverse, None).sum(0)
        return None, grad_weight, grad_mean_weight, None, None


class _MixedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stm: torch.Tensor,
        weight: torch.Tensor,
        mean_weight: torch.Tensor,
        present: torch.Tensor | None,
        inverse: torch.Tensor,
        mean: torch.Tensor,
        mean_inverse: torch.Tensor,
        shares: torch.Tensor,
        offset: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = (stm, weight, mean_weight, present, inverse, mean, mean_inverse, shares)
        normed, mixed = mixed_rows(offset, dtype, *inputs)
        ctx.save_for_backward(*inputs)
        ctx.offset = offset
        return normed, mixed, mixed.view(mixed.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = (*ctx.saved_tensors, *(grad.contiguous() for grad in grads))
        grad_weight, grad_mean_weight, grad_shares = mixed_rows_backward(ctx.offset, *given)
        return None, grad_weight, grad_mean_weight, None, None, None, None, grad_shares, None, None
