"""Experts spread over ranks: every token travels once to each rank that has one of its experts.

It takes the numbers and weights of its experts along. The rank adds up what its experts make of the token,
and one row goes back; where the token came from, these sums are added. The ranks first tell each other how
much they will send; those numbers are the only thing the host waits for.

Shape legend: N tokens of this rank, K experts of a token, D width, E experts, e experts of this rank, R ranks
of the expert group, s tokens that this rank sends (one that goes to two ranks counts twice), m tokens that it
gets, n rows of its experts: pairs of a token that it gets and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._compile import _disable_dynamo

from rxt_dist.kernels.compilation import compiled, compiled_kernel
from rxt_dist.kernels.permute import add_rows
from rxt_dist.model.balance import count_experts
from rxt_dist.model.canonical import Cut
from rxt_dist.model.moe import ExpertOrder, Experts
from rxt_dist.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Departure:
    """What this rank sends.

    Attributes:
        tokens: int64 [N * min(R, K)], of which the first s are the tokens for each other rank, rank by rank,
            and then those with experts here; to_others: the first N * min(R - 1, K) of it.
        inverse: int64 [N * R], where there is each token for each rank, this one last; -1: nowhere.
        counts: int64 [R, 3], for each rank its tokens, its experts' rows, and whether this rank is active.
        choices: int32 [N, 2 * K], bits of the weights (with fp64 [N, 3 * K]) and numbers of the experts.
    """

    tokens: torch.Tensor
    to_others: torch.Tensor
    inverse: torch.Tensor
    counts: torch.Tensor
    choices: torch.Tensor


@dataclass(frozen=True, eq=False)
class Traffic:
    """How much goes where in one exchange.

    Attributes:
        group: the expert group.
        sent, received: tokens to and from every rank of the group, on the host; 0 for this rank.
        own: tokens of this rank with experts here; s is the sum of sent and own, m of received and own.
        rows: n.
        any_active: whether a rank of the group called in a pass of its own (see :func:`uneven_passes`).
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    own: int
    rows: int
    any_active: bool

    @classmethod
    def start(cls, counts: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], Traffic]:
        """Tell every rank what it will get (:class:`Departure`). Collective; the result waits for theirs, and
        there the host waits for the device."""
        incoming = torch.empty_like(counts)
        work = dist.all_to_all_single(incoming, counts, group=group, async_op=True)

        def agree() -> Traffic:
            work.wait()
            sent, received, rows, active = torch.cat([counts[:, :1], incoming], dim=1).T.tolist()
            own, sent[group.rank()], received[group.rank()] = sent[group.rank()], 0, 0
            return cls(group, sent, received, own, sum(rows), any(active))

        return agree


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

    # Sizes are news in every pass: compiled are the parts between messages, as regions of their own.
    @_disable_dynamo
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
        leaving = self.depart(chosen, weights.detach(), active=active)
        x, weights, order, traffic = _Send.apply(x, weights, leaving, self)  # type: ignore[no-untyped-call]
        sums = self(x, order, weights)
        out: torch.Tensor = _SendBack.apply(sums, leaving, traffic)  # type: ignore[no-untyped-call]
        return out, traffic.any_active

    @compiled
    def forward(self, x: torch.Tensor, order: ExpertOrder, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(x, order, weights)

    @compiled_kernel
    def depart(self, chosen: torch.Tensor, weights: torch.Tensor, *, active: bool) -> Departure:
        """What goes where, of tokens that chose the experts ``chosen`` [N, K] with ``weights`` [N, K]."""
        held, top_k = self.w_in.shape[0], self.top_k
        last, own = self.total_experts // held - 1, self.first_expert // held
        chosen, weights = chosen.flatten().view(-1, top_k), weights.flatten().view(-1, top_k)  # a known width
        numbers = torch.arange(last + 1, device=chosen.device)
        ranks = torch.where(numbers == last, own, numbers + (numbers >= own).long())  # this one last
        visited = (torch.div(chosen, held, rounding_mode="floor")[..., None] == ranks).any(dim=1)
        order = ExpertOrder.of_some(torch.where(visited, numbers, last + 1), range(last + 1))
        tokens = torch.div(order.order, last + 1, rounding_mode="floor")
        tokens_of_ranks = order.offsets.long().diff(prepend=order.offsets.new_zeros(1))
        by_rank = torch.where(numbers == own, last, numbers - (numbers > own).long())
        counts = [
            tokens_of_ranks.index_select(0, by_rank),
            count_experts(chosen, self.total_experts).view(-1, held).sum(1),
            torch.full_like(numbers, int(active)),
        ]
        return Departure(
            tokens[: chosen.shape[0] * min(last + 1, top_k)],
            tokens[: chosen.shape[0] * min(last, top_k)],
            order.inverse,
            torch.stack(counts, dim=1),
            torch.cat([weights.view(torch.int32), chosen.int()], dim=1),
        )

    @compiled_kernel
    def arrive(self, choices: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ExpertOrder]:
        """Weights [m, K] of tokens that have come, and the order of their rows, to be cut at n."""
        weights, chosen = choices[:, : -self.top_k], choices[:, -self.top_k :]
        return weights.contiguous().view(dtype), ExpertOrder.of_some(chosen.long(), self.held)


class _Send(torch.autograd.Function):
    """(``x`` [N, D], weights [N, K]) -> (tokens [m, D], their weights [m, K], order of their rows, traffic).

    Tokens are laid out while the counts travel, and sorted while they travel themselves.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, leaving: Departure, experts: ExpertParallel
    ) -> tuple[torch.Tensor, torch.Tensor, ExpertOrder, Traffic]:
        agree = Traffic.start(leaving.counts, experts.group)
        laid_out = [part[leaving.to_others] for part in (leaving.choices, x)]
        traffic = agree()
        choices, read = there(leaving.choices, laid_out[0], leaving.tokens, traffic)
        x, arrived = there(x, laid_out[1], leaving.tokens, traffic)
        read.wait()
        dtype = weights.dtype
        weights, order = experts.arrive(choices, dtype)
        arrived.wait()
        ctx.save_for_backward(leaving.inverse)
        ctx.traffic = traffic
        frozen = [t for t, needed in zip((x, weights), ctx.needs_input_grad, strict=False) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return x, weights, order.first(traffic.rows), traffic

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (inverse,) = ctx.saved_tensors
        coming = [
            back(grad, ctx.traffic) if needed else None
            for grad, needed in zip(grads[:2], ctx.needs_input_grad, strict=False)
        ]
        found: list[torch.Tensor | None] = [None, None]
        for number, one in enumerate(coming):
            if one is not None:
                one[1].wait()
                found[number] = add_rows(one[0], inverse, len(ctx.traffic.sent))
        return found[0], found[1], None, None


class _SendBack(torch.autograd.Function):
    """Sums of this rank's experts [m, D] -> sums of all experts, for the tokens [N, D] of this rank."""

    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor, leaving: Departure, traffic: Traffic) -> torch.Tensor:
        sums, arrived = back(sums, traffic)
        ctx.save_for_backward(leaving.tokens)
        ctx.traffic = traffic
        arrived.wait()
        return add_rows(sums, leaving.inverse, len(traffic.sent))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        traffic: Traffic = ctx.traffic
        laid_out = grads[0][tokens[: sum(traffic.sent)]]
        grad, arrived = there(grads[0], laid_out, tokens, traffic)
        arrived.wait()
        return grad, None, None


def there(
    x: torch.Tensor, laid_out: torch.Tensor, tokens: torch.Tensor, traffic: Traffic
) -> tuple[torch.Tensor, dist.Work]:
    """Send rows of ``x`` [N, ...] to the ranks that ``traffic`` says. Collective.

    Args:
        laid_out: those for other ranks, rank by rank, and whatever follows; tokens: int64 [>= s], numbers of
            these, then of those that stay.

    Returns:
        What this rank's experts get [m, ...], of other ranks by rank, then its own: when the second result
        has been waited for.
    """
    leave, come = sum(traffic.sent), sum(traffic.received)
    out = x.new_empty(come + traffic.own, *x.shape[1:])
    work = dist.all_to_all_single(
        out[:come], laid_out[:leave], traffic.received, traffic.sent, group=traffic.group, async_op=True
    )
    torch.index_select(x, 0, tokens[leave : leave + traffic.own], out=out[come:])
    return out, work


def back(rows: torch.Tensor, traffic: Traffic) -> tuple[torch.Tensor, dist.Work]:
    """The way back of :func:`there`: ``rows`` [m, ...] -> [s, ...]."""
    leave, come = sum(traffic.sent), sum(traffic.received)
    rows = rows.contiguous()
    out = rows.new_empty(leave + traffic.own, *rows.shape[1:])
    work = dist.all_to_all_single(
        out[:leave], rows[:come], traffic.sent, traffic.received, group=traffic.group, async_op=True
    )
    out[leave:].copy_(rows[come:])
    return out, work


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
