"""Where computation passes between what all tensor-parallel ranks do alike and what each does a part of.

Outside, all ranks of the group have the same activations and the same whole gradients of them. Inside, each
computes a part.

Shape legend: N rows, R ranks of the group, c = ceil(N / R) rows of a slice; the last slices may be shorter
or empty.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


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


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``x`` [...] of every rank, [R, ...]; without gradient."""
    out = x.new_empty(group.size(), *x.shape)
    if x.numel():
        dist.all_gather_into_tensor(out.view(-1), x.reshape(-1), group=group)
    return out


def summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A new tensor with the sum of ``x`` over the ranks; without gradient."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _join(x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    count = -(-rows // group.size())
    padded = x.new_zeros(count, *x.shape[1:])
    padded[: x.shape[0]] = x
    return gathered(padded, group).flatten(0, 1)[:rows]


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
        return _join(grads[0], ctx.rows, ctx.group), None


class _JoinSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _join(x, rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0][slice_of(grads[0].shape[0], ctx.group)], None, None
