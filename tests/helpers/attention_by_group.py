"""Attention from its definition, one group at a time."""

from __future__ import annotations

from itertools import pairwise

import torch

from rxt_dist.kernels.attention import AttentionLayout


def attention_by_group(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, *, causal: bool, scale: float
) -> torch.Tensor:
    """[Nq, Hq, d], softmax of masked scores; q [Nq, Hq, d], k and v [Nk, Hk, d], where Hk divides Hq."""
    shared = q.shape[1] // k.shape[1]
    found = [q[:0]]
    bounds = zip(pairwise(layout.cu_q.tolist()), pairwise(layout.cu_k.tolist()), strict=True)
    for (first, last), (start, end) in bounds:
        key, value = (x[start:end].repeat_interleave(shared, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[first:last], key) * scale
        row = torch.arange(last - first, device=q.device)[:, None]
        column = torch.arange(end - start, device=q.device)
        seen = (column <= row + (end - start) - (last - first)) | (not causal)
        share = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        share = torch.where(seen.any(-1, keepdim=True), share, 0.0)
        found.append(torch.einsum("hqk,khd->qhd", share, value))
    return torch.cat(found)
