"""Attention of short groups in Triton.

A program of the backward pass holds the keys and values of a group and the gradients of both, and walks over
the queries. So each score is computed once, and every gradient is complete where it is written: nothing is
added up between programs, and results are equal from run to run.

Shape legend: Nq query rows, Nk key/value rows, Hq query heads, Hk key/value heads, d head width.
"""

# Kernels name their constants in capitals and have no types; tuples in them know only +.
# ruff: noqa: N803, N806, RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="untyped-decorator, assignment"

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.kernels.triton_support import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

_WIDTHS = (16, 32, 64, 128)
_ALIGNED = 8  # elements of 16 bits in the 16 bytes that one load can move
_MOST_KEY_NUMBERS = 4096  # of a group's keys: d for each; their gradients stay in the registers of a program
_FORWARD_TILE = (64, 64)  # queries, keys
_BACKWARD_TILE = (64, 64)
_WARPS = 4  # of a program
_SPLITS = 2  # programs that share the queries of a group in the forward pass


def longest_keys(width: int) -> int:
    """Keys that a group may have with heads of ``width``; 0 where the kernels do not take the width."""
    return _MOST_KEY_NUMBERS // width if width in _WIDTHS else 0


def short_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Softmax attention inside groups of few keys and any number of queries.

    Nothing here depends on how long the groups are, so that compiled code is made once.

    Args:
        q: [Nq, Hq, d]; k, v: [Nk, Hk, d], Hk divides Hq; all of one dtype, at least one row each.
        cu_q, cu_k: int32 [B+1], boundaries of the groups, which have ``longest_keys(d)`` keys at most.
        causal: the last query of a group sees all its keys, each earlier one a key fewer.

    Returns:
        [Nq, Hq, d]. A query that sees no key gives 0. Gradients of rows of k and v behind ``cu_k[-1]`` are
        undefined.
    """
    if scale <= 0:  # the kernels take the largest product for the largest score
        q, scale = q * scale, 1.0
    inputs = (_loadable(x) for x in (q, k, v))
    boundaries = (cu_q,) if cu_k is cu_q else (cu_q, cu_k)  # the compiler takes no tensor twice
    out: torch.Tensor = _ShortAttention.apply(*inputs, causal, scale, *boundaries)  # type: ignore[no-untyped-call]
    return out


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """``x`` [N, H, d] where the heads of a row lie side by side and rows are aligned, else such a copy."""
    side_by_side = x.stride(1) == x.shape[2] and x.stride(2) == 1
    return x if side_by_side and x.stride(0) % _ALIGNED == 0 else x.contiguous()


# Scale and strides are constants of the kernels: compiled code passes other floating-point numbers in fp64.
class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool,
        scale: float,
        *boundaries: torch.Tensor,
    ) -> torch.Tensor:
        cu_q, cu_k = boundaries[0], boundaries[-1]
        rows, heads, width = q.shape
        out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
        level = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
        grid = (_SPLITS * heads * (cu_q.shape[0] - 1),)
        _forward[grid](
            q, k, v, out, level, cu_q, cu_k, rows, SCALE=scale,
            STRIDE_Q=q.stride(0), STRIDE_K=k.stride(0), STRIDE_V=v.stride(0),
            HEADS=heads, SHARED=heads // k.shape[1], WIDTH=width, CAUSAL=causal, SPLITS=_SPLITS,
            BLOCK_Q=_FORWARD_TILE[0], BLOCK_K=_FORWARD_TILE[1], num_warps=_WARPS, num_stages=2,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, level, *boundaries)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, level, *boundaries = ctx.saved_tensors
        cu_q, cu_k = boundaries[0], boundaries[-1]
        rows, heads, width = q.shape
        kv_heads = k.shape[1]
        grad_q = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
        grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        chunks = max(1, longest_keys(width) // _BACKWARD_TILE[1])
        grid = (kv_heads * (cu_q.shape[0] - 1),)
        _backward[grid](
            q, k, v, out, grads[0].contiguous(), level, grad_q, grad_k, grad_v, cu_q, cu_k, rows,
            SCALE=ctx.scale, STRIDE_Q=q.stride(0), STRIDE_K=k.stride(0), STRIDE_V=v.stride(0),
            HEADS=heads, SHARED=heads // kv_heads, WIDTH=width, CAUSAL=ctx.causal, CHUNKS=chunks,
            BLOCK_Q=_BACKWARD_TILE[0], BLOCK_K=_BACKWARD_TILE[1], num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, *(None for _ in boundaries)


# In the kernels 1.4426950408889634 is the logarithm of e to base 2.
if HAS_TRITON:

    @triton.jit
    def _tile(base, row, stride, offsets, inside, WIDTH: tl.constexpr):
        """WIDTH numbers of the rows ``row + offsets``, which lie ``stride`` apart; zeros where not inside."""
        at = base + row.to(tl.int64) * stride
        columns = tl.arange(0, WIDTH)
        return tl.load(at + offsets[:, None] * stride + columns[None, :], mask=inside[:, None], other=0.0)

    @triton.jit
    def _forward(
        q, k, v, out, level, cu_q, cu_k, rows_q, SCALE: tl.constexpr,
        STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr,
        HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
        SPLITS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Every SPLITS-th tile of queries of a group, for a query head.

        ``level`` [HEADS, rows_q]: the logarithm to base 2 of the sum of 2^score over the keys that a query
        sees; infinite where it sees none, which makes its probabilities 0 in the backward pass.
        """
        split = tl.program_id(0) % SPLITS
        head = tl.program_id(0) // SPLITS % HEADS
        group = tl.program_id(0) // (SPLITS * HEADS)
        # Not in a function of its own, for which torch.compile would believe that the boundaries are written.
        start_q = tl.load(cu_q + group)
        len_q = tl.load(cu_q + group + 1) - start_q
        start_k = tl.load(cu_k + group)
        len_k = tl.load(cu_k + group + 1) - start_k
        q += head * WIDTH
        k += head // SHARED * WIDTH
        v += head // SHARED * WIDTH
        out += head * WIDTH
        rows = tl.arange(0, BLOCK_Q)
        keys = tl.arange(0, BLOCK_K)
        columns = tl.arange(0, WIDTH)
        for first in range(split * BLOCK_Q, len_q, SPLITS * BLOCK_Q):
            inside = first + rows < len_q
            query = _tile(q, start_q + first, STRIDE_Q, rows, inside, WIDTH)
            most = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            mixed = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
            bound = tl.full([BLOCK_Q], 0, tl.int32) + len_k
            all_see, seen = len_k, len_k
            if CAUSAL:
                all_see = len_k - len_q + 1 + first
                bound = tl.minimum(all_see + rows, len_k)
                seen = tl.minimum(all_see + BLOCK_Q - 1, len_k)
            # Tiles of keys that every query of the tile sees need no mask.
            clear = tl.maximum(tl.minimum(all_see, len_k), 0) // BLOCK_K * BLOCK_K
            for chunk in tl.range(0, clear, BLOCK_K):
                key = _tile(k, start_k + chunk, STRIDE_K, keys, keys >= 0, WIDTH)
                value = _tile(v, start_k + chunk, STRIDE_V, keys, keys >= 0, WIDTH)
                scores = tl.dot(query, tl.trans(key))
                before = most
                most = tl.maximum(before, tl.max(scores, 1) * (SCALE * 1.4426950408889634))
                share = tl.exp2(scores * (SCALE * 1.4426950408889634) - most[:, None])
                shrink = tl.exp2(before - most)
                total = total * shrink + tl.sum(share, 1)
                mixed = tl.dot(share.to(value.dtype), value, mixed * shrink[:, None])
            for chunk in tl.range(clear, seen, BLOCK_K, num_stages=1):
                exists = chunk + keys < len_k
                key = _tile(k, start_k + chunk, STRIDE_K, keys, exists, WIDTH)
                value = _tile(v, start_k + chunk, STRIDE_V, keys, exists, WIDTH)
                scores = tl.dot(query, tl.trans(key))
                scores = tl.where((chunk + keys)[None, :] < bound[:, None], scores, float("-inf"))
                before = most
                most = tl.maximum(before, tl.max(scores, 1) * (SCALE * 1.4426950408889634))
                shift = tl.where(most == float("-inf"), 0.0, most)
                share = tl.exp2(scores * (SCALE * 1.4426950408889634) - shift[:, None])
                shrink = tl.exp2(before - shift)
                total = total * shrink + tl.sum(share, 1)
                mixed = tl.dot(share.to(value.dtype), value, mixed * shrink[:, None])
            none = total == 0.0
            mixed = mixed / tl.where(none, 1.0, total)[:, None]
            at = (start_q + first).to(tl.int64) * (HEADS * WIDTH)
            here = rows[:, None] * (HEADS * WIDTH) + columns[None, :]
            tl.store(out + at + here, mixed.to(out.dtype.element_ty), mask=inside[:, None])
            at = head.to(tl.int64) * rows_q + start_q + first
            tl.store(level + at + rows, tl.where(none, float("inf"), most + tl.log2(total)), mask=inside)

    @triton.jit
    def _backward(
        q, k, v, out, grad, level, grad_q, grad_k, grad_v, cu_q, cu_k, rows_q, SCALE: tl.constexpr,
        STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr,
        HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
        CHUNKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """All of a group for a key/value head and the SHARED query heads that read it."""
        KV_HEADS: tl.constexpr = HEADS // SHARED
        kv_head = tl.program_id(0) % KV_HEADS
        group = tl.program_id(0) // KV_HEADS
        start_q = tl.load(cu_q + group)
        len_q = tl.load(cu_q + group + 1) - start_q
        start_k = tl.load(cu_k + group)
        len_k = tl.load(cu_k + group + 1) - start_k
        rows = tl.arange(0, BLOCK_Q)
        keys = tl.arange(0, BLOCK_K)
        columns = tl.arange(0, WIDTH)
        k_tiles, v_tiles, grad_k_tiles, grad_v_tiles = (), (), (), ()
        for c in tl.static_range(CHUNKS):
            exists = c * BLOCK_K + keys < len_k
            k_tiles += (_tile(k + kv_head * WIDTH, start_k + c * BLOCK_K, STRIDE_K, keys, exists, WIDTH),)
            v_tiles += (_tile(v + kv_head * WIDTH, start_k + c * BLOCK_K, STRIDE_V, keys, exists, WIDTH),)
            grad_k_tiles += (tl.zeros([BLOCK_K, WIDTH], tl.float32),)
            grad_v_tiles += (tl.zeros([BLOCK_K, WIDTH], tl.float32),)
        for step in tl.range(0, tl.cdiv(len_q, BLOCK_Q) * SHARED, num_stages=1):
            head = kv_head * SHARED + step % SHARED
            first = step // SHARED * BLOCK_Q
            inside = first + rows < len_q
            query = _tile(q + head * WIDTH, start_q + first, STRIDE_Q, rows, inside, WIDTH)
            grad_out = _tile(grad + head * WIDTH, start_q + first, HEADS * WIDTH, rows, inside, WIDTH)
            mixed = _tile(out + head * WIDTH, start_q + first, HEADS * WIDTH, rows, inside, WIDTH)
            delta = tl.sum(grad_out.to(tl.float32) * mixed.to(tl.float32), 1)
            at = level + head.to(tl.int64) * rows_q + start_q + first
            # As a column: else every thread would load the numbers of all its queries.
            top = tl.max(tl.load(at + rows[:, None], mask=inside[:, None], other=float("inf")), 1)
            grad_query = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
            all_see, seen = len_k, len_k
            if CAUSAL:
                all_see = len_k - len_q + 1 + first
                seen = tl.minimum(all_see + BLOCK_Q - 1, len_k)
            for c in tl.static_range(CHUNKS):
                # Once or never. A loop, as the compiler moves what follows a branch into the branch.
                for _ in tl.range(c * BLOCK_K, tl.minimum(seen, c * BLOCK_K + 1), num_stages=1):
                    scores = tl.dot(k_tiles[c], tl.trans(query))
                    grad_share = tl.dot(v_tiles[c], tl.trans(grad_out))
                    share = tl.exp2(scores * (SCALE * 1.4426950408889634) - top[None, :])
                    if (c + 1) * BLOCK_K > all_see:
                        if CAUSAL:
                            visible = (c * BLOCK_K - all_see + keys)[:, None] < rows[None, :]
                        else:
                            visible = (c * BLOCK_K + keys < len_k)[:, None]
                        share = tl.where(visible, share, 0.0)
                    grad_v_tile = tl.dot(share.to(query.dtype), grad_out, grad_v_tiles[c])
                    grad_scores = (share * (grad_share - delta[None, :])).to(query.dtype)
                    grad_k_tile = tl.dot(grad_scores, query, grad_k_tiles[c])
                    grad_query = tl.dot(tl.trans(grad_scores), k_tiles[c], grad_query)
                    grad_k_tiles = grad_k_tiles[:c] + (grad_k_tile,) + grad_k_tiles[c + 1 :]
                    grad_v_tiles = grad_v_tiles[:c] + (grad_v_tile,) + grad_v_tiles[c + 1 :]
            at = (start_q + first).to(tl.int64) * (HEADS * WIDTH) + head * WIDTH
            here = rows[:, None] * (HEADS * WIDTH) + columns[None, :]
            tl.store(grad_q + at + here, (grad_query * SCALE).to(query.dtype), mask=inside[:, None])
        for c in tl.static_range(CHUNKS):
            exists = c * BLOCK_K + keys < len_k
            at = (start_k + c * BLOCK_K).to(tl.int64) * (KV_HEADS * WIDTH) + kv_head * WIDTH
            here = keys[:, None] * (KV_HEADS * WIDTH) + columns[None, :]
            dtype = grad_k.dtype.element_ty
            tl.store(grad_k + at + here, (grad_k_tiles[c] * SCALE).to(dtype), mask=exists[:, None])
            tl.store(grad_v + at + here, grad_v_tiles[c].to(dtype), mask=exists[:, None])
