"""flash-attn's kernels behind two operators of our own.

Those of the package are dispatched in Python, argument by argument, which costs the host more than all the
rest of a call. Its autograd function also breaks the graph of a compiled layer where PyTorch takes no tensor
twice, as ``cu_q`` and ``cu_k`` of a self-attention are one. Importing this module needs flash-attn.

Shape legend: Nq query rows, Nk key/value rows, Hq query heads, Hk key/value heads (a divisor of Hq),
d head width, B groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_interface

_WIDTH_UNIT = 8  # the kernels take head widths that are a multiple of this


def _function_of(operator: Any) -> Callable[..., Any]:
    """The function that an operator of flash-attn runs; itself, if it is none."""
    function: Callable[..., Any] = getattr(operator, "_init_fn", operator)
    return function


_run_forward = _function_of(flash_attn_interface._flash_attn_varlen_forward)
_run_backward = _function_of(flash_attn_interface._flash_attn_varlen_backward)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of query rows ``cu_q[b]:cu_q[b+1]`` to key rows ``cu_k[b]:cu_k[b+1]``.

    Args:
        q: [Nq, Hq, d]; k, v: [Nk, Hk, d], bf16, of any strides.
        cu_q, cu_k: int32 [B+1]; max_q, max_k: rows of the longest group.
        causal: the last query of a group sees all its keys, each earlier one a key fewer.
        scale: factor of the scores.

    Returns:
        [Nq, Hq, d]. The gradient of keys and values that no group has is undefined.
    """
    width = q.shape[2]
    if width % _WIDTH_UNIT:
        q, k, v = (F.pad(x, (0, -width % _WIDTH_UNIT)) for x in (q, k, v))
    keys = None if cu_k is cu_q else cu_k
    out: torch.Tensor = _FlashAttention.apply(q, k, v, cu_q, keys, max_q, max_k, causal, scale)  # type: ignore[no-untyped-call]
    return out[..., :width] if width % _WIDTH_UNIT else out


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        groups = (cu_q, cu_q if cu_k is None else cu_k)
        ctx.settings = max_q, max_k, causal, scale
        out, normaliser = torch.ops.rxt.flash_forward(q, k, v, *groups, *ctx.settings)
        ctx.save_for_backward(q, k, v, out, normaliser, cu_q, cu_k)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, normaliser, cu_q, cu_k = ctx.saved_tensors
        groups = (cu_q, cu_q if cu_k is None else cu_k)
        found = torch.ops.rxt.flash_backward(grads[0], q, k, v, out, normaliser, *groups, *ctx.settings)
        return *found, *[None] * 6


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Nq, Hq, d] and fp32 [Hq, Nq], log of the sum of exponentials of every query."""
    out, normaliser, _, _ = _run_forward(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
    )
    return out, normaliser


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    normaliser: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    grad_q, grad_k, grad_v = found = _dense(q), _dense(k), _dense(v)
    _run_backward(
        grad,
        q,
        k,
        v,
        out,
        normaliser,
        grad_q,
        grad_k,
        grad_v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    return found


def _dense(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_forward(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _fake_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _dense(q), _dense(k), _dense(v)


_library: Any = torch.library.Library("rxt", "FRAGMENT")  # type: ignore[no-untyped-call]
_GROUPS = "Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, bool causal, float scale"
_library.define(f"flash_forward(Tensor q, Tensor k, Tensor v, {_GROUPS}) -> (Tensor, Tensor)")
_library.define(
    "flash_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor normaliser, "
    f"{_GROUPS}) -> (Tensor, Tensor, Tensor)"
)
for _name, _function, _fake in (
    ("flash_forward", _forward, _fake_forward),
    ("flash_backward", _backward, _fake_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rxt::{_name}", _fake, lib=_library)
