"""A stand-in for the package flash-attn: its two operators of packed sequences, in plain PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import pairwise

import torch

from benchmarks.flash_stand_in import flash_stand_in


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Nq, Hq, d] and log of the sum of exponentials [Hq, Nq], group by group."""
    share = q.shape[1] // k.shape[1]
    outputs, normalisers = [], []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        keys, values = (x[c:d].repeat_interleave(share, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if causal:
            first_unseen = torch.arange(int(b - a))[:, None] + int((d - c) - (b - a)) + 1
            scores = scores.masked_fill(torch.arange(int(d - c)) >= first_unseen, -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        normalisers.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(normalisers, 1)


def _check(q: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int) -> None:
    assert q.shape[2] % 8 == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)


@torch.library.custom_op("plain_flash::forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert dropout_p == softcap == 0.0
    found, normaliser = _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    out = torch.empty_like(q)
    out.copy_(found)
    return out, normaliser, q.new_empty(0), q.new_empty(2)


@torch.library.custom_op("plain_flash::backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert (dropout_p, softcap, window_size_left, window_size_right) == (0.0, 0.0, -1, -1)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        found, normaliser = _attend(*inputs, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        assert torch.equal(normaliser, softmax_lse)
        torch.testing.assert_close(found, out)
        gradients = torch.autograd.grad(found, inputs, dout)
    for place, gradient in zip((dq, dk, dv), gradients, strict=True):
        place.copy_(gradient)
    return torch.zeros_like(softmax_lse)


def plain_flash() -> AbstractContextManager[None]:
    """Inside, attention runs on the backend "flash" over the stand-in."""
    return flash_stand_in(_flash_attn_varlen_forward, _flash_attn_varlen_backward)
