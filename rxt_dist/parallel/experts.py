"""Experts spread over ranks: every token travels once to each other rank that has one of its experts.

It takes the numbers and weights of its experts along. The rank adds up what its experts make of the token,
and one row goes back; where the token came from, these sums are added. The ranks first tell each other how
much they will send; those numbers are the only thing the host waits for.

What a rank's own experts do for its own tokens needs no message, and is done while messages travel: first
products while the host learns the numbers and starts messages, activations while tokens come, second products
while sums go back. The backward pass mirrors this: autograd runs later calls first, so that the gradients of
second products are computed while gradients of sums come, the others while gradients of tokens go back.

Messages go between first products and activations because a grouped product fills the device with blocks that
stay to its end: those that find their place taken by a message start when others are done, and the product
takes twice its time. Kernels of many short blocks lose only the places that the message takes.

Shape legend: N tokens of this rank, K experts of a token, D width, E experts, e experts of this rank, R ranks
of the expert group, s tokens that this rank sends (one that goes to two ranks counts twice), m tokens that it
gets, n rows of its experts: pairs of a token and one of its experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._compile import _disable_dynamo

from rxt_dist.kernels.compilation import compiled_kernel
from rxt_dist.kernels.permute import add_rows, copy_rows
from rxt_dist.model.balance import count_experts
from rxt_dist.model.canonical import Cut
from rxt_dist.model.moe import ExpertOrder, Experts
from rxt_dist.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Departure:
    """What this rank sends.

    Attributes:
        order: int64 [N * min(R - 1, K)], of which the first s are the tokens for each other rank, rank by
            rank, as slots of the flattened [N, R - 1].
        inverse: int64 [N * (R - 1)], where there is each of these slots; -1: nowhere.
        counts: int64 [R, 3], for each rank its tokens (of this one none), its experts' rows, and whether this
            rank is active.
        choices: int32 [N * min(R - 1, K), 2 * K], of the tokens in ``order``, bits of the weights (of fp64
            twice as many) and numbers of the experts.
        chosen: int64 [N, K], numbers of the experts.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    counts: torch.Tensor
    choices: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True, eq=False)
class Traffic:
    """How much goes where in one exchange.

    Attributes:
        group: the expert group.
        sent, received: tokens to and from every rank of the group, on the host; 0 for this rank.
        staying, coming: n of this rank's own tokens, and of those that it gets.
        any_active: whether a rank of the group called in a pass of its own (see :func:`uneven_passes`).
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    staying: int
    coming: int
    any_active: bool

    @classmethod
    def start(cls, counts: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], Traffic]:
        """Tell every rank what it will get (:class:`Departure`). Collective; the result waits for theirs, and
        there the host waits for the device, but not for what it was given after this."""
        incoming = torch.empty_like(counts)
        work = dist.all_to_all_single(incoming, counts, group=group, async_op=True)
        arrived = _to_host(work, counts, incoming)

        def agree() -> Traffic:
            outgoing, coming = arrived()
            sent = [line[0] for line in outgoing]
            received, rows, active = zip(*coming, strict=True)
            staying = rows[group.rank()]
            return cls(group, sent, list(received), staying, sum(rows) - staying, any(active))

        return agree


def _to_host(work: dist.Work, *tensors: torch.Tensor) -> Callable[[], list[Any]]:
    """Copy ``tensors``, of one shape, when ``work`` is done; the result waits for that, and returns lists."""
    if not tensors[0].is_cuda:

        def read() -> list[Any]:
            work.wait()
            return torch.stack(tensors).tolist()

        return read
    copies = tensors[0].new_empty(len(tensors), *tensors[0].shape, device="cpu", pin_memory=True)
    with torch.cuda.stream(_copying(tensors[0].device)):
        work.wait()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        done = torch.cuda.current_stream().record_event()

    alive = list(tensors)

    def arrived() -> list[Any]:
        done.synchronize()
        alive.clear()  # only now may their memory be used again
        return copies.tolist()

    return arrived


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class Message:
    """Rows on their way: ``rows`` are there when :meth:`arrived` returns them."""

    rows: torch.Tensor
    work: dist.Work

    def arrived(self) -> torch.Tensor:
        self.work.wait()
        return self.rows


def there(rows: torch.Tensor, traffic: Traffic, room: torch.Tensor | None = None) -> Message:
    """Send the first s of ``rows`` [>= s, ...], laid out rank by rank: [m, ...], in ``room``. Collective."""
    return _exchange(rows[: sum(traffic.sent)], traffic.sent, traffic.received, traffic.group, room)


def back(rows: torch.Tensor, traffic: Traffic) -> Message:
    """The way back of :func:`there`: ``rows`` [m, ...] -> [s, ...]. Collective."""
    return _exchange(rows.contiguous(), traffic.received, traffic.sent, traffic.group)


def _exchange(
    rows: torch.Tensor,
    leave: list[int],
    come: list[int],
    group: dist.ProcessGroup,
    room: torch.Tensor | None = None,
) -> Message:
    out = rows.new_empty(sum(come), *rows.shape[1:]) if room is None else room
    return Message(out, dist.all_to_all_single(out, rows, come, leave, group=group, async_op=True))


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
        return self.travel(x, weights, self.depart(chosen, weights.detach(), active=True))

    def serve(self) -> bool:
        """Compute for the others in one call of theirs; whether any of them had a pass of its own."""
        x = self.w_in.new_empty(0, self.w_in.shape[2])
        weights = x.new_empty(0, self.top_k, dtype=torch.promote_types(x.dtype, torch.float32))
        chosen = torch.empty_like(weights, dtype=torch.int64)
        return self._travel(x, weights, self.depart(chosen, weights, active=False))[1]

    # What is left to compile would be small regions, of which each costs the host more than its operations.
    @_disable_dynamo
    def travel(self, x: torch.Tensor, weights: torch.Tensor, leaving: Departure) -> torch.Tensor:
        """What :meth:`visit` returns for ``x`` [N, D] and ``weights`` [N, K] of which :meth:`depart` told."""
        return self._travel(x, weights, leaving)[0]

    def _travel(
        self, x: torch.Tensor, weights: torch.Tensor, leaving: Departure
    ) -> tuple[torch.Tensor, bool]:
        """What :meth:`travel` returns, and whether a rank of the group has called it."""
        agree = Traffic.start(leaving.counts, self.group)
        # While the host waits, the device has this to do, and beyond that until the first product is started.
        laid_out = copy_rows(x.detach(), leaving.order, leaving.inverse, self.group.size() - 1)
        staying = ExpertOrder.of_some(leaving.chosen, self.held)
        trip = Trip(agree())
        coming: torch.Tensor = _Send.apply(x, weights, leaving.inverse, trip)  # type: ignore[no-untyped-call]
        own = staying.first(trip.traffic.staying)
        entered = self.enter(x, own, self.top_k)
        trip.send(leaving.choices, laid_out)
        hidden = self.hidden(entered, own)
        others, others_weights, order = _Arrive.apply(coming, weights.dtype, trip, self)  # type: ignore[no-untyped-call]
        sums = _SendBack.apply(self(others, order, others_weights), trip)  # type: ignore[no-untyped-call]
        out: torch.Tensor = _Join.apply(  # type: ignore[no-untyped-call]
            sums, self.leave(hidden, own, weights), leaving.order, leaving.inverse, trip
        )
        return out, trip.traffic.any_active

    @compiled_kernel
    def depart(self, chosen: torch.Tensor, weights: torch.Tensor, *, active: bool) -> Departure:
        """What goes where, of tokens that chose the experts ``chosen`` [N, K] with ``weights`` [N, K]."""
        held, top_k = self.w_in.shape[0], self.top_k
        others, own = self.total_experts // held - 1, self.first_expert // held
        chosen, weights = chosen.flatten().view(-1, top_k), weights.flatten().view(-1, top_k)  # a known width
        numbers = torch.arange(others, device=chosen.device)
        ranks = numbers + (numbers >= own).long()
        visited = (torch.div(chosen, held, rounding_mode="floor")[..., None] == ranks).any(dim=1)
        sorted_ways = ExpertOrder.of_some(torch.where(visited, numbers, others), range(others))
        order = sorted_ways.order[: chosen.shape[0] * min(others, top_k)]
        tokens = torch.div(order, others, rounding_mode="floor")
        rows = count_experts(chosen, self.total_experts).view(-1, held).sum(1)
        ends = sorted_ways.offsets.long()
        sent = ends.diff(prepend=ends.new_zeros(1))
        counts = [
            torch.cat([sent[:own], sent.new_zeros(1), sent[own:]]),
            rows,
            torch.full_like(rows, int(active)),
        ]
        choices = [weights.view(torch.int32)[tokens], chosen[tokens].int()]
        return Departure(
            order, sorted_ways.inverse, torch.stack(counts, dim=1), torch.cat(choices, dim=1), chosen
        )

    def arrive(self, choices: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ExpertOrder]:
        """Weights [m, K] of tokens that have come, and the order of their rows, to be cut at n."""
        weights, chosen = choices[:, : -self.top_k], choices[:, -self.top_k :]
        return weights.contiguous().view(dtype), ExpertOrder.of_some(chosen, self.held)


class Trip:
    """Messages of one pass and of its backward pass, from their sending until they are waited for."""

    room: torch.Tensor
    """Where tokens will be, [m, D]."""
    choices: Message
    tokens: Message
    sums: Message
    grad_sums: Message
    grads: list[Message | None]
    """Gradients of tokens and of weights."""
    needed: tuple[bool, bool]
    """Whether tokens and weights have gradients."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def send(self, choices: torch.Tensor, tokens: torch.Tensor) -> None:
        """Both laid out by rank, [>= s, ...]. Collective."""
        self.choices = there(choices, self.traffic)
        self.tokens = there(tokens, self.traffic, self.room)
        del self.room


class _Send(torch.autograd.Function):
    """``x`` [N, D] and weights [N, K] -> tokens [m, D] that :meth:`Trip.send` will bring."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor, trip: Trip
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.trip, trip.needed = trip, ctx.needs_input_grad[:2]
        coming = x.new_empty(sum(trip.traffic.received), x.shape[1])
        trip.room = coming.detach()
        return coming

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        copies = len(ctx.trip.traffic.sent) - 1
        coming = ctx.trip.grads
        del ctx.trip.grads
        found = [None if one is None else add_rows(one.arrived(), inverse, copies) for one in coming]
        return *found, None, None


class _Arrive(torch.autograd.Function):
    """Tokens on their way -> (tokens [m, D], their weights [m, K], order of their rows), sorted meanwhile."""

    @staticmethod
    def forward(
        ctx: Any, coming: torch.Tensor, dtype: torch.dtype, trip: Trip, experts: ExpertParallel
    ) -> tuple[torch.Tensor, torch.Tensor, ExpertOrder]:
        weights, order = experts.arrive(trip.choices.arrived(), dtype)
        tokens = trip.tokens.arrived()
        del trip.choices, trip.tokens
        ctx.trip = trip
        frozen = [t for t, needed in zip((tokens, weights), trip.needed, strict=True) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return tokens, weights, order.first(trip.traffic.coming)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.trip.grads = [
            back(grad, ctx.trip.traffic) if needed else None
            for grad, needed in zip(grads[:2], ctx.trip.needed, strict=True)
        ]
        return grads[0], None, None, None  # of this shape; those that count are on their way


class _SendBack(torch.autograd.Function):
    """Sums of this rank's experts for others [m, D] -> the same, on their way."""

    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor, trip: Trip) -> torch.Tensor:
        ctx.trip = trip
        trip.sums = back(sums, trip.traffic)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        coming = ctx.trip.grad_sums
        del ctx.trip.grad_sums
        return coming.arrived(), None


class _Join(torch.autograd.Function):
    """Sums on their way and those of this rank's own experts [N, D] -> sums of all experts [N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        sums: torch.Tensor,
        own: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        trip: Trip,
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.trip = trip
        returned = trip.sums.arrived()
        del trip.sums
        return add_rows(returned, inverse, len(trip.traffic.sent) - 1, own)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        order, inverse = ctx.saved_tensors
        traffic = ctx.trip.traffic
        laid_out = copy_rows(grads[0], order[: sum(traffic.sent)], inverse, len(traffic.sent) - 1)
        ctx.trip.grad_sums = there(laid_out, traffic)
        return ctx.trip.grad_sums.rows, grads[0], None, None, None


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
