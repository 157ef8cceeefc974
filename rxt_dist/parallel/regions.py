"""Where computation passes between what all tensor-parallel ranks do alike and what each does a part of.

Outside, all ranks of the group have the same activations and the same whole gradients of them, or each has a
slice of the rows (sequence parallelism: Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198). Inside,
each computes a part of all rows.

| from | to | | forward | backward |
|---|---|---|---|---|
| whole | parts | :func:`enter_parts`, :func:`entered_products` | nothing | sum |
| parts | whole | :func:`leave_parts` | sum | nothing |
| slices | parts | :func:`gather_slices`, :func:`gathered_products` | gather | sum, slice |
| parts | slices | :func:`scatter_parts` | sum, slice | gather |
| whole | slices | :func:`take_slice` | slice | gather |
| slices | whole | :func:`join_slices` | gather | slice |

Megatron-core has mappings like these, which run on CUDA devices only and on equal slices. Outside of compiled
regions the exchanges of a backward pass are started before products that do not need them; inside, messages
are operations of the graph, which the compiler orders (:func:`rxt_dist.kernels.compilation.set_compile`).

Shape legend: N rows, R ranks of the group, c = ceil(N / R) rows of a slice; the last slices may be shorter
or empty, n the rows of this rank's. D inputs and O outputs of a product, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as traceable
import torch.nn.functional as F


def enter_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``x`` of which each rank goes on to compute a part; their gradients are added up."""
    out: torch.Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def leave_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of ``x`` over the ranks, which all of them go on with."""
    out: torch.Tensor = _Leave.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def slice_of(rows: int, group: dist.ProcessGroup) -> slice:
    """The rows of this rank's slice of ``rows``."""
    count = -(-rows // group.size())
    return slice(min(rows, group.rank() * count), min(rows, (group.rank() + 1) * count))


def take_slice(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's slice of the rows of ``x`` [N, ...], of which every rank works on its own."""
    out: torch.Tensor = _TakeSlice.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def join_slices(x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All slices [N, ...] of ``rows`` N rows, of which ``x`` is this rank's."""
    out: torch.Tensor = _JoinSlices.apply(x, rows, group)  # type: ignore[no-untyped-call]
    return out


def gather_slices(x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All slices [N, ...] of ``rows`` N rows, of which each rank goes on to compute a part; their gradients
    are added up. ``x`` [n, ...] is this rank's slice."""
    out: torch.Tensor = _GatherSlices.apply(x, rows, group)  # type: ignore[no-untyped-call]
    return out


def scatter_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's slice [n, ...] of the sum of ``x`` [N, ...] over the ranks."""
    out: torch.Tensor = _ScatterParts.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def entered_products(
    x: torch.Tensor, matrices: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """``enter_parts(x) @ matrix.mT`` [N, O] for each of ``matrices`` [O, D]; or with ``x`` [L, N, D] and
    matrices [L, O, D], [L, N, O]."""
    out: tuple[torch.Tensor, ...] = _Products.apply(x, None, group, *matrices)  # type: ignore[no-untyped-call]
    return out


def gathered_products(
    x: torch.Tensor, matrices: Sequence[torch.Tensor], rows: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """``gather_slices(x) @ matrix.mT`` [N, O] for each of ``matrices`` [O, D]; or with ``x`` [L, n, D] and
    matrices [L, O, D], [L, N, O].

    For the backward pass only this rank's slice ``x`` is kept; the others are gathered again.
    """
    out: tuple[torch.Tensor, ...] = _Products.apply(x, rows, group, *matrices)  # type: ignore[no-untyped-call]
    return out


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``x`` [...] of every rank, [R, ...]; without gradient."""
    out = x.new_empty(group.size(), *x.shape)
    if x.numel():
        dist.all_gather_into_tensor(out.view(-1), x.reshape(-1), group=group)
    return out


def joined(x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The slices of all ranks, [N, ...], of which ``x`` [n, ...] is this rank's; without gradient."""
    return _start_join(x, rows, group)()


def summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A new tensor with the sum of ``x`` over the ranks; without gradient."""
    if torch.compiler.is_compiling():
        total: torch.Tensor = traceable.all_reduce(x.contiguous(), "sum", group)
        return total
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


Pending = Callable[[], torch.Tensor]
"""Waits for an exchange that was started and gives its result."""


def _start_join(x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> Pending:
    """The slices of all ranks, [N, ...], of which ``x`` [n, ...] is this rank's."""
    ranks = group.size()
    count, place = -(-rows // ranks), slice_of(rows, group)
    assert len(x) == place.stop - place.start, (len(x), rows)
    own = _lengthened(x.contiguous(), count, ranks)
    if torch.compiler.is_compiling():
        return _pending(None, traceable.all_gather_tensor(own, 0, group)[:rows])
    out = x.new_empty(ranks * count, *x.shape[1:])
    work = dist.all_gather_into_tensor(out, own, group=group, async_op=True) if out.numel() else None
    return _pending(work, out[:rows])


def _start_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """This rank's slice [n, ...] of the sum of ``x`` [N, ...] over the ranks."""
    rows, ranks = x.shape[0], group.size()
    count, own = -(-rows // ranks), slice_of(rows, group)
    parts = _lengthened(x.contiguous(), ranks * count, ranks)
    if torch.compiler.is_compiling():
        out = traceable.reduce_scatter_tensor(parts, "sum", 0, group)
        return _pending(None, out[: own.stop - own.start])
    out = x.new_empty(count, *x.shape[1:])
    work = dist.reduce_scatter_tensor(out, parts, group=group, async_op=True) if out.numel() else None
    return _pending(work, out[: own.stop - own.start])


def _start_sum(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum of ``x`` over the ranks, perhaps in its place."""
    if torch.compiler.is_compiling():
        return _pending(None, summed(x, group))
    return _pending(dist.all_reduce(x, group=group, async_op=True), x)


def _pending(work: dist.Work | None, result: torch.Tensor) -> Pending:
    """Of what ``work`` brings; None: nothing, or an operation of a graph, which the compiler waits for."""

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return result

    return wait


def _lengthened(x: torch.Tensor, rows: int, ranks: int) -> torch.Tensor:
    """``x`` with rows of zeros at its end, as many as are missing to ``rows``: less than ``ranks``."""
    # A compiled region that asked would be made once for slices of equal length and once for others.
    if not torch.compiler.is_compiling() and x.shape[0] == rows:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, ranks))[:rows]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return summed(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _TakeSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return x[slice_of(x.shape[0], group)].clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _start_join(grads[0], ctx.rows, ctx.group)(), None


class _JoinSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _start_join(x, rows, group)()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0][slice_of(grads[0].shape[0], ctx.group)], None, None


class _GatherSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _start_join(x, rows, group)()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _start_scatter(grads[0], ctx.group)(), None, None


class _ScatterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return _start_scatter(x, group)()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _start_join(grads[0], ctx.rows, ctx.group)(), None


class _Products(torch.autograd.Function):
    """Of all rows with some matrices, where each rank has all ``rows`` (None) or its slice of so many.

    Exchanges of the backward pass run beside its products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: int | None, group: dist.ProcessGroup, *matrices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.sliced, ctx.group = rows is not None, group
        trains = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if trains else None, *matrices)
        whole = _start_whole(x, rows, group)()
        return tuple(torch.matmul(whole, matrix.mT) for matrix in matrices)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *matrices = ctx.saved_tensors
        need_x, _, _, *needed = ctx.needs_input_grad
        rows = grads[0].shape[-2] if ctx.sliced else None
        whole = None if x is None else _start_whole(x, rows, ctx.group)
        own: Pending | None = None
        if need_x:
            total = _added_products(grads, matrices)
            if rows is None:
                own = _start_sum(total, ctx.group)
            else:
                own = _transposed(_start_scatter(total.transpose(0, -2), ctx.group))
        found: list[torch.Tensor | None] = [None] * len(grads)
        if whole is not None:
            found = _weight_gradients(grads, whole(), needed)
        return None if own is None else own(), None, None, *found


def _start_whole(x: torch.Tensor, rows: int | None, group: dist.ProcessGroup) -> Pending:
    """All rows, [N, D] or [L, N, D], of which ``x`` has all (``rows`` None) or this rank's slice."""
    if rows is None:
        return lambda: x
    return _transposed(_start_join(x.transpose(0, -2), rows, group))


def _transposed(pending: Pending) -> Pending:
    return lambda: pending().transpose(0, -2)


def _added_products(gradients: Sequence[torch.Tensor], matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gradient of what was multiplied by all of ``matrices``."""
    total = torch.matmul(gradients[0], matrices[0])
    for gradient, matrix in zip(gradients[1:], matrices[1:], strict=True):
        total += torch.matmul(gradient, matrix)
    return total


def _weight_gradients(
    gradients: Sequence[torch.Tensor], x: torch.Tensor, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of the matrices that ``x`` was multiplied by, where they are ``needed``."""
    pairs = zip(gradients, needed, strict=True)
    return [torch.matmul(gradient.mT, x) if wanted else None for gradient, wanted in pairs]
