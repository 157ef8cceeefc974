"""Activations of feed-forwards and experts, gated (Shazeer, 2020: GLU variants) or plain.

Shape legend: n rows sorted by expert, E experts, F width of the result, W width of the hidden rows: F, or 2F
where gated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rxt_dist.kernels.grouped_gemm import add_group_bias
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels.activation_triton import activate_backward, activate_forward

Activation = Literal["silu", "gelu", "relu"]
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def activate(hidden: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
    """Gated: [..., 2F], first half value, second gate -> value * act(gate) [..., F]; else act(hidden)."""
    if uses_triton(hidden) and hidden.numel():
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = _fused(rows, None, None, activation, gated)
        return out.view(*hidden.shape[:-1], out.shape[-1])
    if not gated:
        return ACTIVATIONS[activation](hidden)
    value, gate = hidden.chunk(2, dim=-1)
    return value * ACTIVATIONS[activation](gate)


def activate_rows(
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    expert_of_row: torch.Tensor,
    activation: Activation,
    gated: bool,
) -> torch.Tensor:
    """:func:`activate` of ``hidden[i] + bias[expert_of_row[i]]``.

    Args:
        hidden: [n, W], rows sorted by expert; bias: [E, W] of the same dtype, or None.
        offsets: int32 [E], the end of each expert's rows; expert_of_row: int64 [n]. ``offsets[-1] == n``, or
            less where Triton's kernels run, and what is behind is undefined.

    Returns:
        [n, F]. The gradient of the bias adds up the rows of an expert in the same order every time; experts
        without rows get exact zeros.
    """
    if uses_triton(hidden) and hidden.shape[0]:
        return _fused(hidden, bias, offsets[-1:] if bias is None else offsets, activation, gated)
    if bias is not None:
        hidden = add_group_bias(hidden, bias, offsets, expert_of_row)
    return activate(hidden, activation, gated)


def _fused(
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    activation: Activation,
    gated: bool,
) -> torch.Tensor:
    out: torch.Tensor = _ActivateRows.apply(hidden, bias, offsets, activation, gated)  # type: ignore[no-untyped-call]
    return out


class _ActivateRows(torch.autograd.Function):
    """The result is computed anew in the backward pass, from hidden rows that no bias was added to."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        bias: torch.Tensor | None,
        offsets: torch.Tensor | None,
        activation: Activation,
        gated: bool,
    ) -> torch.Tensor:
        hidden = hidden.contiguous()
        bias = None if bias is None else bias.contiguous()
        ctx.activation, ctx.gated = activation, gated
        ctx.save_for_backward(hidden, bias, offsets)
        return activate_forward(hidden, bias, offsets, activation, gated)

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        hidden, bias, offsets = ctx.saved_tensors
        grad_hidden, grad_bias = activate_backward(
            grads[0].contiguous(), hidden, bias, offsets, ctx.activation, ctx.gated, ctx.needs_input_grad[1]
        )
        return grad_hidden, grad_bias, None, None, None
