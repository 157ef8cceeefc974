"""Experts spread over ranks: every token travels once to each rank that has one of its experts.

It takes the numbers and weights of its experts along. The rank adds up what its experts make of the token,
and one row goes back; where the token came from, these sums are added. The ranks first tell each other how
much they will send; those numbers are the only thing the host waits for.

Shape legend: N tokens of this rank, K experts of a token, D width, E experts, e experts of this rank, R ranks
of the expert group, s tokens that this rank sends (one that goes to two ranks counts twice), m tokens that it
gets, n rows of its experts: pairs of a token that it gets and one of its experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._compile import _disable_dynamo

from rxt_dist.kernels.permute import add_permuted, repeat_permuted
from rxt_dist.model.balance import count_experts
from rxt_dist.model.canonical import Cut
from rxt_dist.model.moe import ExpertOrder, Experts
from rxt_dist.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Traffic:
    """How much goes where in one exchange.

    Attributes:
        sent, received: tokens to and from every rank of the group, on the host; tokens: s; rows: n.
        any_active: whether a rank of the group called in a pass of its own (see :func:`uneven_passes`).
    """

    sent: list[int]
    received: list[int]
    tokens: int
    rows: int
    any_active: bool

    @classmethod
    @_disable_dynamo
    def agree(
        cls, tokens: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup, *, active: bool
    ) -> Traffic:
        """Tell every rank what it will get. Collective; the one point where the host waits for the device.

        ``tokens``: int32 [R], where those that go to each rank end; ``rows``: int64 [R], what its experts
        will have of them.
        """
        counts = tokens.long().diff(prepend=tokens.new_zeros(1))
        outgoing = torch.stack([counts, rows, torch.full_like(rows, int(active))], dim=1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        sent, received, rows_of_ranks, flags = torch.cat([counts[None], incoming.T]).tolist()
        return cls(sent, received, sum(sent), sum(rows_of_ranks), any(flags))


class ExpertParallel(Experts):
    """The part of a layer's experts that this rank holds; stands where :class:`Experts` stood.

    What :meth:`visit` takes and returns is the same. Collective over the expert group: every rank of it calls
    at the same time, also with no tokens.

    Args:
        whole: all experts; top_k: K.
    """

    def __init__(self, whole: Experts, top_k: int, mesh: Mesh, rank: int, group: dist.ProcessGroup) -> None:
        total, width, hidden = whole.w_out.shape
        held = mesh.experts_of(rank, total)
        with whole.w_out.device:
            super().__init__(
                len(held),
                width,
                hidden,
                gated=whole.gated,
                activation=whole.activation,
                biased=whole.b_in is not None,
                init=whole.init,
            )
        self.first_expert = held.start
        self.total_experts, self.top_k = total, top_k
        self.group = group

    @property
    def held(self) -> range:
        """Numbers of the experts of this rank."""
        return range(self.first_expert, self.first_expert + self.w_in.shape[0])

    def cuts(self) -> dict[str, list[Cut]]:
        return {
            name: [Cut.along(0, (self.total_experts, *parameter.shape[1:]), self.held)]
            for name, parameter in self.named_parameters()
        }

    def visit(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._visit(x, chosen, weights, active=True)[0]

    def serve(self) -> bool:
        """Compute for the others in one call of theirs; whether any of them had a pass of its own."""
        x = self.w_in.new_empty(0, self.w_in.shape[2])
        weights = x.new_empty(0, self.top_k, dtype=torch.promote_types(x.dtype, torch.float32))
        return self._visit(x, torch.empty_like(weights, dtype=torch.int64), weights, active=False)[1]

    def _visit(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, *, active: bool
    ) -> tuple[torch.Tensor, bool]:
        """What :meth:`visit` returns, and whether a rank of the group has called it."""
        order = self.order_by_rank(chosen)
        traffic = Traffic.agree(order.offsets, self.rows_by_rank(chosen), self.group, active=active)
        order = order.first(traffic.tokens)
        x, weights, chosen = self.copies(order, x, weights, chosen)
        x = exchange(x, traffic.sent, traffic.received, self.group)
        weights, chosen = exchange_choices(weights, chosen, traffic.sent, traffic.received, self.group)
        sums = self(x, ExpertOrder.of_some(chosen, self.held).first(traffic.rows), weights)
        sums = exchange(sums, traffic.received, traffic.sent, self.group)
        return add_permuted(sums, order.order, order.inverse, order.offsets.shape[0]), traffic.any_active

    def order_by_rank(self, chosen: torch.Tensor) -> ExpertOrder:
        """Where tokens go that chose the experts ``chosen`` [N, K]: slots [N, R], those that stand for a
        token and a rank with one of its experts, by rank. See :meth:`ExpertOrder.of_some`."""
        held = self.w_in.shape[0]
        ranks = torch.arange(self.total_experts // held, device=chosen.device)
        visited = (torch.div(chosen, held, rounding_mode="floor")[..., None] == ranks).any(dim=1)
        return ExpertOrder.of_some(torch.where(visited, ranks, len(ranks)), range(len(ranks)))

    def rows_by_rank(self, chosen: torch.Tensor) -> torch.Tensor:
        """Of the experts ``chosen`` [N, K], how many each rank holds: int64 [R]."""
        return count_experts(chosen, self.total_experts).view(-1, self.w_in.shape[0]).sum(1)

    def copies(
        self, order: ExpertOrder, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Tokens as they go to all ranks in ``order``: ``x`` [s, D], and weights and numbers of their experts
        [s, K]."""
        ranks = order.offsets.shape[0]
        return (
            repeat_permuted(x, order.order, order.inverse, ranks),
            repeat_permuted(weights, order.order, order.inverse, ranks),
            chosen.index_select(0, torch.div(order.order, ranks, rounding_mode="floor")),
        )


@_disable_dynamo
def exchange(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send consecutive runs of ``rows`` [s, D] to the ranks of ``group``; returns what came [m, D], by rank.

    The gradient travels the same way back. Collective, also where there is nothing to send.
    """
    out: torch.Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return out


@_disable_dynamo
def exchange_choices(
    weights: torch.Tensor,
    chosen: torch.Tensor,
    sent: list[int],
    received: list[int],
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`exchange`, in one message, for the weights [s, K] and numbers (int64 [s, K], below 2**31) of
    the experts that tokens chose. Only weights have a gradient."""
    out: tuple[torch.Tensor, torch.Tensor] = _ExchangeChoices.apply(  # type: ignore[no-untyped-call]
        weights, chosen, sent, received, group
    )
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


class _ExchangeChoices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        bits = weights.contiguous().view(torch.int32)
        both = _all_to_all(torch.cat([bits, chosen.int()], dim=1), sent, received, group)
        bits, numbers = both[:, : bits.shape[1]], both[:, bits.shape[1] :].long()
        ctx.mark_non_differentiable(numbers)
        return bits.contiguous().view(weights.dtype), numbers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None, None


def _all_to_all(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


@contextmanager
def uneven_passes(module: nn.Module) -> Iterator[None]:
    """Inside, the ranks may run ``module`` different numbers of times, as evaluations do.

    At the end a rank computes for the others with its experts until all have arrived. Nothing else inside
    may be collective. Training needs none of this: there all ranks run equally often.
    """
    yield
    layers = [part for part in module.modules() if isinstance(part, ExpertParallel)]
    with torch.no_grad():
        busy = bool(layers)
        while busy:  # a pass of the others calls every layer once
            busy = sum(layer.serve() for layer in layers) > 0
