"""Cross-entropy of rows of logits, and its gradient in their place: in one kernel, or in two where the logits
of a row lie on several ranks.

A program has a row. It reads it from memory once, and again from the cache.

Shape legend: C rows, V vocabulary, m rows of all chunks.
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
def _columns(piece, threads: tl.constexpr, each: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns that the threads read together, [threads, each]."""
    first = piece * threads * each
    return first + tl.arange(0, threads)[:, None] * each + tl.arange(0, each)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _largest_and_sum(  # type: ignore[no-untyped-def]
    logits, vocabulary: tl.constexpr, count: tl.constexpr, threads: tl.constexpr, each: tl.constexpr
):
    """Largest logit of a row, and the logarithm of the sum of exponentials of the differences from it."""
    pieces = ()
    for piece in tl.static_range(count):
        at = _columns(piece, threads, each)
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
    return top, tl.log(tl.sum(total * tl.exp2((best - top) * _LOG2_E), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _is_first_of_largest(  # type: ignore[no-untyped-def]
    logits,
    column,
    wanted,
    top,
    vocabulary: tl.constexpr,
    count: tl.constexpr,
    threads: tl.constexpr,
    each: tl.constexpr,
):
    """Whether ``wanted``, the logit of ``column``, is the largest and no earlier one is as large."""
    earlier = 0
    if wanted == top:
        for piece in range(count):
            if piece * threads * each < column:
                at = _columns(piece, threads, each)
                x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
                earlier += tl.sum(tl.sum(((x == top) & (at < column)).to(tl.int32), 1), 0)
    return (wanted == top) & (earlier == 0)


@triton.jit  # type: ignore[untyped-decorator]
def _put_gradient(  # type: ignore[no-untyped-def]
    logits,
    column,
    inside,
    wanted,
    normaliser,
    vocabulary: tl.constexpr,
    count: tl.constexpr,
    threads: tl.constexpr,
    each: tl.constexpr,
):
    """Softmax of a row in its place, less 1 at the target's column, if that is inside."""
    below = normaliser * _LOG2_E
    for piece in tl.static_range(count):  # backwards: the end of the row was read last
        at = _columns(count - 1 - piece, threads, each)
        x = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        share = tl.exp2(x * _LOG2_E - below)
        tl.store(logits + at, share.to(logits.dtype.element_ty), mask=at < vocabulary)
    tl.debug_barrier()  # the next number replaces one of these
    share = tl.exp2(wanted * _LOG2_E - below)
    tl.store(logits + column, (share - 1.0).to(logits.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _whole_rows(  # type: ignore[no-untyped-def]
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
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    column = tl.load(targets + row).to(tl.int32)
    inside = (column >= 0) & (column < vocabulary)
    wanted = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
    top, log_total = _largest_and_sum(logits, vocabulary, count, threads, each)
    hit = _is_first_of_largest(logits, column, wanted, top, vocabulary, count, threads, each)
    tl.store(losses + row, (top - wanted) + log_total)
    tl.store(hits + row, hit.to(tl.int32))
    if gradient:
        normaliser = top + log_total
        _put_gradient(logits, column, inside, wanted, normaliser, vocabulary, count, threads, each)


@triton.jit  # type: ignore[untyped-decorator]
def _part_of_rows(  # type: ignore[no-untyped-def]
    logits,
    targets,
    numbers,
    first,
    rows,
    vocabulary: tl.constexpr,
    count: tl.constexpr,
    threads: tl.constexpr,
    each: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    column = (tl.load(targets + row) - first).to(tl.int32)
    inside = (column >= 0) & (column < vocabulary)
    wanted = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
    top, log_total = _largest_and_sum(logits, vocabulary, count, threads, each)
    hit = _is_first_of_largest(logits, column, wanted, top, vocabulary, count, threads, each)
    numbers += row
    tl.store(numbers, top + log_total)
    tl.store(numbers + rows, tl.where(inside, wanted, 0.0))
    tl.store(numbers + 2 * rows, top)
    tl.store(numbers + 3 * rows, hit.to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_of_part(  # type: ignore[no-untyped-def]
    logits,
    targets,
    normalisers,
    first,
    vocabulary: tl.constexpr,
    count: tl.constexpr,
    threads: tl.constexpr,
    each: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    column = (tl.load(targets + row) - first).to(tl.int32)
    inside = (column >= 0) & (column < vocabulary)
    wanted = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
    tl.debug_barrier()  # read before it is overwritten
    normaliser = tl.load(normalisers + row)
    _put_gradient(logits, column, inside, wanted, normaliser, vocabulary, count, threads, each)


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
    rows, *sizes = _sizes(logits)
    _whole_rows[(rows,)](logits, targets, losses, hits, *sizes, gradient, num_warps=_WARPS)


def score_parts(logits: torch.Tensor, targets: torch.Tensor, first: int, numbers: torch.Tensor) -> None:
    """What ranks with parts of the rows tell one another.

    Args:
        logits: [C, V] contiguous, of the tokens from ``first`` on; neither C nor V is 0.
        targets: int64 [C], of these tokens or of others.
        numbers: written, fp32 [4, C], a slice of the columns of [4, m]: logarithm of the sum of
            exponentials, the target's logit or 0, the largest logit, and 1 if that, the first of equal ones,
            is the target's.
    """
    rows, *sizes = _sizes(logits)
    _part_of_rows[(rows,)](logits, targets, numbers, first, numbers.stride(0), *sizes, num_warps=_WARPS)


def put_gradient_of_part(
    logits: torch.Tensor, targets: torch.Tensor, first: int, normalisers: torch.Tensor
) -> None:
    """Overwrite ``logits``, as in :func:`score_parts`, with the gradient of the summed loss.

    Args:
        normalisers: fp32 [C], logarithms of the sums of exponentials over all tokens.
    """
    rows, *sizes = _sizes(logits)
    _gradient_of_part[(rows,)](logits, targets, normalisers, first, *sizes, num_warps=_WARPS)


def _sizes(logits: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Programs, and how they read rows."""
    rows, vocabulary = logits.shape
    return rows, vocabulary, triton.cdiv(vocabulary, _THREADS * _EACH), _THREADS, _EACH
