"""Cross-entropy of rows of logits, and its gradient in their place, in one kernel.

Shape legend: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WARPS = 16
_THREADS = 32 * _WARPS
_EACH = 8
"""Neighbouring logits that a thread reads at once: 16 bytes of bf16."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def _row_kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    hits,
    vocabulary: tl.constexpr,
    count: tl.constexpr,
    threads: tl.constexpr,
    each: tl.constexpr,
    gradient: tl.constexpr,
):
    width: tl.constexpr = threads * each
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    columns = tl.arange(0, threads)[:, None] * each + tl.arange(0, each)[None, :]
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocabulary)
    wanted = tl.load(logits + target, mask=inside, other=-float("inf")).to(tl.float32)

    pieces = ()
    for piece in tl.static_range(count):
        at = piece * width + columns
        pieces += (tl.load(logits + at, mask=at < vocabulary, other=-float("inf")),)  # type: ignore[assignment]
    # Each thread has a maximum and a sum of its own. They begin with a finite number, so that logits of -inf
    # have no NaN for a difference.
    best = tl.full((threads,), -1e38, tl.float32)
    total = tl.zeros((threads,), tl.float32)
    for piece in tl.static_range(count):
        x = pieces[piece].to(tl.float32)  # type: ignore[var-annotated]
        higher = tl.maximum(best, tl.max(x, 1))
        terms = tl.exp2(x * _LOG2_E - (higher * _LOG2_E)[:, None])
        total = total * tl.exp2((best - higher) * _LOG2_E) + tl.sum(terms, 1)
        best = higher
    top = tl.max(best, 0)
    log_total = tl.log(tl.sum(total * tl.exp2((best - top) * _LOG2_E), 0))

    earlier = 0  # as large and before the target: of equal logits the first one counts
    if wanted == top:
        place = target.to(tl.int32)
        for before in range(count):
            if before * width < place:
                at = before * width + columns
                x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
                earlier += tl.sum(tl.sum(((x == top) & (at < place)).to(tl.int32), 1), 0)
    tl.store(losses + row, (top - wanted) + log_total)
    tl.store(hits + row, ((wanted == top) & (earlier == 0)).to(tl.int32))

    if gradient:
        normaliser = (top + log_total) * _LOG2_E
        # Read again, from the cache: registers would not hold the row. Backwards: its end is there for sure.
        for piece in tl.static_range(count):
            at = (count - 1 - piece) * width + columns
            x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
            share = tl.exp2(x * _LOG2_E - normaliser)
            tl.store(logits + at, share.to(logits.dtype.element_ty), mask=at < vocabulary)
        tl.debug_barrier()  # the next number replaces one of these
        share = tl.exp2(wanted * _LOG2_E - normaliser)
        tl.store(logits + target, (share - 1.0).to(logits.dtype.element_ty), mask=inside)


def score_rows(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, hits: torch.Tensor, *, gradient: bool
) -> None:
    """Cross-entropy of each row, and whether its largest logit, the first of equal ones, is the target's.

    Args:
        logits: [C, V] contiguous, C at least 1; with ``gradient`` overwritten by that of the summed loss.
        targets: int64 [C], each in [0, V).
        losses: written, fp32 [C].
        hits: written, int32 [C]; 1 or 0.
    """
    rows, vocabulary = logits.shape
    pieces = triton.cdiv(vocabulary, _THREADS * _EACH)
    _row_kernel[(rows,)](
        logits, targets, losses, hits, vocabulary, pieces, _THREADS, _EACH, gradient, num_warps=_WARPS
    )
