"""Gated mixtures of a memory and an update, without tensors of a memory's size in between.

Updates are given as the product of a linear map and its bias, which the mixture adds.

Shape legend: L layers, B lanes, S STM slots, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.kernels.norm import RMS_EPS
from rxt_dist.kernels.triton_support import HAS_TRITON
from rxt_dist.model.memory_gate import MemoryGate
from rxt_dist.model.memory_sources import Norm

if HAS_TRITON:
    from rxt_dist.kernels.memory_mix_triton import mix_and_norm, mix_and_norm_backward, mix_into


def mixed_and_normed(
    stm: torch.Tensor,
    product: torch.Tensor,
    bias: torch.Tensor | None,
    gate: MemoryGate,
    sums: torch.Tensor,
    norm: Norm,
    present: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixture of ``stm`` and an update, and its norm.

    Args:
        stm: fp32 [L, B, S, D], without gradient; product: [L, B * S, D]; bias: [L, D].
        sums: [L, B, S], over the channels of ``stm``; norm: an RMS norm of every layer.
        present: bool [B]; other lanes of ``stm`` count as zeros, whatever they hold. None for all.

    Returns:
        The mixture fp32 [L, B, S, D], its norm like ``product``, the sums over the mixture's channels, and
        the gate's values.
    """
    assert norm.weight is not None
    update, value, shares = _gated(gate, sums, product, bias)
    mixed, normed, _, mixed_sums = _MixAndNorm.apply(  # type: ignore[no-untyped-call]
        stm.contiguous(), update, product.detach(), _constant(bias), shares, norm.weight.float(), present,
        _offset(gate),
    )  # fmt: skip
    return mixed, normed, mixed_sums, value


def mixed_into(
    before: torch.Tensor,
    old: torch.Tensor,
    product: torch.Tensor,
    bias: torch.Tensor | None,
    gate: MemoryGate,
    sums: torch.Tensor,
    present: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixture of ``old`` and an update [L, B, S, D], or ``before``, which has no gradient, in lanes that
    are not ``present``; and the gate's values. Other arguments as of :func:`mixed_and_normed`."""
    update, value, shares = _gated(gate, sums, product, bias)
    after: torch.Tensor = _MixInto.apply(  # type: ignore[no-untyped-call]
        before.contiguous(), old, update, product.detach(), _constant(bias), shares, present, _offset(gate)
    )
    return after, value


def _gated(
    gate: MemoryGate, sums: torch.Tensor, product: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The update, the gate's values, and these as [L, B, S]."""
    update = product if bias is None else product + bias[:, None]
    value = gate.value_of((sums + update.float().sum(-1).view(sums.shape)) / product.shape[-1])
    return update, value, value.squeeze(-1).expand(sums.shape).contiguous()


def _constant(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


def _offset(gate: MemoryGate) -> float:
    return 0.0 if gate.config.activation == "sigmoid" else 1.0


# Kernels read the product and its bias; ``update``, their sum, is there to be given a gradient. Compiled
# code, in which nothing else reads it, never stores it.
class _MixAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stm: torch.Tensor,
        update: torch.Tensor,
        product: torch.Tensor,
        bias: torch.Tensor | None,
        shares: torch.Tensor,
        weight: torch.Tensor,
        present: torch.Tensor | None,
        offset: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mixed, normed, inverse, sums = mix_and_norm(
            offset, RMS_EPS, stm, product, bias, shares, weight, present
        )
        ctx.save_for_backward(stm, product, bias, shares, weight, present, inverse)
        ctx.mark_non_differentiable(inverse)
        ctx.offset = offset
        return mixed, normed, inverse, sums

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: what is computed again is given away then
        given = (*saved, *(grads[k].contiguous() for k in (0, 1, 3)))
        grad, grad_shares, grad_weight = mix_and_norm_backward(ctx.offset, *given)
        product, shares = saved[1], saved[3]
        grad_update = ((ctx.offset + shares).unsqueeze(-1) * grad).to(product.dtype).view(product.shape)
        return None, grad_update, None, None, grad_shares, grad_weight, None, None


class _MixInto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        before: torch.Tensor,
        old: torch.Tensor,
        update: torch.Tensor,
        product: torch.Tensor,
        bias: torch.Tensor | None,
        shares: torch.Tensor,
        present: torch.Tensor | None,
        offset: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(old, product, bias, shares, present)
        ctx.offset = offset
        return mix_into(offset, before, old, product, bias, shares, present)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        old, product, bias, shares, present = ctx.saved_tensors
        grad = grads[0]
        if present is not None:
            grad = grad.masked_fill(~present[:, None, None], 0.0)
        new = product.float() if bias is None else product.float() + bias.float()[:, None]
        grad_shares = (grad * (new.view(old.shape) - old)).sum(-1)
        share = shares.unsqueeze(-1)
        grad_update = ((ctx.offset + share) * grad).to(product.dtype).view(product.shape)
        return None, (1.0 - share) * grad, grad_update, None, None, grad_shares, None, None
