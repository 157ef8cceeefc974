"""Messages between ranks whose experts are spread: tokens there, sums back, and their gradients.

Shape legend: N tokens of this rank, K experts of a token, D width, R ranks of the expert group, s tokens that
this rank sends (one that goes to two ranks counts twice), m tokens that it gets.
"""

from __future__ import annotations

import functools
import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from rxt_dist.kernels.permute import add_rows, copy_rows
from rxt_dist.parallel.peers import Kind, Message, Peers, can_write

logger = logging.getLogger(__name__)

_GRADIENTS: tuple[Kind, Kind] = ("grad_tokens", "grad_weights")
"""Of what :func:`arriving` gives."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """How much goes where in one exchange.

    Attributes:
        group: the expert group.
        sent, received: tokens to and from every rank of the group, on the host; 0 for this rank.
        any_active: whether a rank of the group called in a pass of its own
            (:func:`rxt_dist.parallel.experts.uneven_passes`).
        rows: of this rank's experts, those of its own tokens and those of the m others; None: not known yet.
        peers: for messages within a host where all tokens travel; None: NCCL brings them.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    any_active: bool
    rows: tuple[int, int] | None
    peers: Peers | None = None

    @classmethod
    def start(cls, counts: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], Traffic]:
        """Tell every rank what it will get: ``counts`` of :class:`rxt_dist.parallel.experts.Departure`.
        Collective; the result waits for theirs, and there the host waits for the device, but not for what it
        was given after this."""
        incoming = torch.empty_like(counts)
        work = dist.all_to_all_single(incoming, counts, group=group, async_op=True)
        arrived = to_host(counts, incoming, behind=work)

        def agree() -> Traffic:
            outgoing, coming = arrived()
            sent = [line[0] for line in outgoing]
            received, rows, active = zip(*coming, strict=True)
            staying = rows[group.rank()]
            return cls(group, sent, list(received), any(active), (staying, sum(rows) - staying))

        return agree

    def starts(self, way: Literal["there", "back"]) -> list[int]:
        """Behind how many rows those of this rank are, at every rank, if all tokens travel."""
        own, before = self.group.rank(), 0
        tokens = [max(self.sent) if rank == own else count for rank, count in enumerate(self.received)]
        if way == "back":
            return [(own - (own > rank)) * count for rank, count in enumerate(tokens)]
        before = sum(tokens[:own])
        return [before - (count if rank < own else 0) for rank, count in enumerate(tokens)]


class PassSizes:
    """How many tokens every rank of an expert group brings to a stack of layers, where all of them travel.

    The ranks ask each other in the first layer of a pass; in those behind it they have as many. They ask from
    host to host, so that nobody waits for a device.

    Args:
        hosts: a group of the same ranks that exchanges tensors of the host.
    """

    def __init__(self, hosts: dist.ProcessGroup) -> None:
        self._hosts = hosts
        self._layers = 0
        self._tokens: list[int] = []
        self._any_active = False
        self._peers: Peers | None = None
        self._writes: bool | None = None

    def add_layer(self) -> bool:
        """Whether it is the first one, which has to :meth:`ask`."""
        self._layers += 1
        return self._layers == 1

    def ask(self, tokens: int, *, active: bool) -> None:
        """This rank has so many ``tokens``; is the pass one of its own? Collective."""
        found = told([tokens, int(active)], self._hosts)
        self._tokens, self._any_active = found[::2], any(found[1::2])

    def open_peers(self, group: dist.ProcessGroup, device: torch.device, token: int, choice: int) -> None:
        """Have ranks of one host write into each other's memory, if they can, in rows of so many bytes.
        Collective."""
        if self._writes is None:
            self._writes = can_write(device, self._hosts)
        ranks, tokens = len(self._tokens), self._tokens
        rows = max(max(sum(tokens) - count, (ranks - 1) * count) for count in tokens)
        if not self._writes or (self._peers is not None and self._peers.holds(rows, token, choice)):
            return
        torch.cuda.synchronize(device)  # nobody writes any more where there was room until now
        try:
            self._peers = Peers(group, self._hosts, device, rows, token, choice)
        except RuntimeError as error:
            self._writes, self._peers = False, None
            logger.warning("runtime.peer_copies: NCCL brings tokens to experts, as one GPU said: %s", error)

    def traffic(self, group: dist.ProcessGroup) -> Traffic:
        """All tokens go to all other ranks."""
        own, tokens = group.rank(), self._tokens
        sent = [0 if rank == own else tokens[own] for rank in range(len(tokens))]
        received = [0 if rank == own else count for rank, count in enumerate(tokens)]
        return Traffic(group, sent, received, self._any_active, None, self._peers)


def told(numbers: list[int], hosts: dist.ProcessGroup) -> list[int]:
    """The ``numbers`` of all ranks, one after the other. Collective over ``hosts``, a group for tensors of
    the host; no tensor is read, so that nobody seems to wait for a device."""
    own = array("q", numbers)
    found = array("q", numbers) * hosts.size()
    dist.all_gather_into_tensor(
        torch.frombuffer(found, dtype=torch.int64), torch.frombuffer(own, dtype=torch.int64), group=hosts
    )
    return list(found)


def to_host(*tensors: torch.Tensor, behind: dist.Work | None = None) -> Callable[[], list[Any]]:
    """Copy ``tensors``, of one shape, when ``behind`` is done, or what the device has been given until now.
    The result waits for that, and returns lists."""
    if not tensors[0].is_cuda:

        @functools.cache
        def read() -> list[Any]:
            if behind is not None:
                behind.wait()
            return torch.stack(tensors).tolist()

        return read
    copies = tensors[0].new_empty(len(tensors), *tensors[0].shape, device="cpu", pin_memory=True)
    copying, computing = _copying(tensors[0].device), torch.cuda.current_stream(tensors[0].device)
    with torch.cuda.stream(copying):
        if behind is None:
            copying.wait_stream(computing)
        else:
            behind.wait()
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        done = copying.record_event()

    alive = list(tensors)

    def arrived() -> list[Any]:
        done.synchronize()
        alive.clear()  # only now may their memory be used again
        return copies.tolist()

    return arrived


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def lay_out(
    x: torch.Tensor, order: torch.Tensor | None, inverse: torch.Tensor | None, copies: int
) -> torch.Tensor:
    """Rows of ``x`` [N, ...] for each of ``copies`` = R - 1 other ranks, rank by rank: [>= s, ...].

    ``order``, ``inverse``: of :class:`rxt_dist.parallel.experts.Departure`; None: all go to all.
    """
    if order is None or inverse is None:
        return x if copies == 1 else x.repeat(copies, 1)
    return copy_rows(x, order, inverse, copies)


def add_up(rows: torch.Tensor, inverse: torch.Tensor | None, copies: int) -> torch.Tensor:
    """The way back of :func:`lay_out`: sums of the ``rows`` [s, D] of each token, [N, D]."""
    if inverse is None and copies == 1:
        return rows
    if inverse is None:
        inverse = torch.arange(rows.shape[0], device=rows.device).view(copies, -1).t().flatten()
    return add_rows(rows, inverse, copies)


def there(rows: torch.Tensor, traffic: Traffic, kind: Kind, room: torch.Tensor | None = None) -> Message:
    """Send the first s of ``rows`` [>= s, ...], laid out rank by rank: [m, ...], in ``room``. Collective."""
    rows = rows[: sum(traffic.sent)]
    if traffic.peers is not None:
        come = sum(traffic.received)
        return traffic.peers.exchange(kind, rows, traffic.sent, traffic.starts("there"), come)
    return _exchange(rows, traffic.sent, traffic.received, traffic.group, room)


def back(rows: torch.Tensor, traffic: Traffic, kind: Kind) -> Message:
    """The way back of :func:`there`: ``rows`` [m, ...] -> [s, ...]. Collective."""
    if traffic.peers is not None:
        come = sum(traffic.sent)
        return traffic.peers.exchange(kind, rows, traffic.received, traffic.starts("back"), come)
    return _exchange(rows, traffic.received, traffic.sent, traffic.group)


def _exchange(
    rows: torch.Tensor,
    leave: list[int],
    come: list[int],
    group: dist.ProcessGroup,
    room: torch.Tensor | None = None,
) -> Message:
    out = rows.new_empty(sum(come), *rows.shape[1:]) if room is None else room
    work = dist.all_to_all_single(out, rows.contiguous(), come, leave, group=group, async_op=True)
    return Message(out, work.wait)


class Trip:
    """Messages of one pass and of its backward pass, from their sending until they are waited for."""

    room: torch.Tensor | None
    """Where tokens will be, [m, D]; None: the way of the message knows."""
    tokens: Message
    sums: Message
    grad_sums: Message
    grads: list[Message | None]
    """Gradients of tokens and of weights."""
    needed: tuple[bool, bool]
    """Whether tokens and weights have gradients."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.copies = len(traffic.sent) - 1

    def send(self, tokens: torch.Tensor) -> None:
        """``tokens`` as :func:`lay_out` gives them. Collective."""
        self.tokens = there(tokens, self.traffic, "tokens", self.room)
        del self.room


def sending(x: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor | None, trip: Trip) -> torch.Tensor:
    """``x`` [N, D] and weights [N, K] -> tokens [m, D] that :meth:`Trip.send` will bring."""
    coming: torch.Tensor = _Send.apply(x, weights, inverse, trip)  # type: ignore[no-untyped-call]
    return coming


def arriving(coming: torch.Tensor, weights: torch.Tensor, trip: Trip) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens on their way [m, D] and ``weights`` [m, K] that are there -> (tokens, weights), there."""
    arrived: tuple[torch.Tensor, torch.Tensor] = _Arrive.apply(coming, weights, trip)  # type: ignore[no-untyped-call]
    return arrived


def sending_back(sums: torch.Tensor, trip: Trip) -> torch.Tensor:
    """Sums of this rank's experts for others [m, D] -> the same, on their way. Collective."""
    out: torch.Tensor = _SendBack.apply(sums, trip)  # type: ignore[no-untyped-call]
    return out


def coming_back(sums: torch.Tensor, inverse: torch.Tensor | None, trip: Trip) -> torch.Tensor:
    """Sums on their way [m, D] -> those that have come for this rank's tokens, added up, [N, D]."""
    out: torch.Tensor = _ComeBack.apply(sums, inverse, trip)  # type: ignore[no-untyped-call]
    return out


def answered(
    out: torch.Tensor, order: torch.Tensor | None, inverse: torch.Tensor | None, trip: Trip
) -> torch.Tensor:
    """``out`` [N, D], made of what has come back. In the backward pass its gradient is sent before anything
    else is done with it."""
    result: torch.Tensor = _Answer.apply(out, order, inverse, trip)  # type: ignore[no-untyped-call]
    return result


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor | None, trip: Trip
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.trip, trip.needed = trip, ctx.needs_input_grad[:2]
        come = sum(trip.traffic.received)
        if trip.traffic.peers is not None:  # there is room where they are written
            trip.room = None
            return x.new_empty(1, 1).expand(come, x.shape[1])
        coming = x.new_empty(come, x.shape[1])
        trip.room = coming.detach()
        return coming

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        coming = ctx.trip.grads
        del ctx.trip.grads
        found = [None if one is None else add_up(one.arrived(), inverse, ctx.trip.copies) for one in coming]
        return *found, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coming: torch.Tensor, weights: torch.Tensor, trip: Trip
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = trip.tokens.arrived()
        del trip.tokens
        ctx.trip = trip
        weights = weights.view_as(weights)
        frozen = [t for t, needed in zip((tokens, weights), trip.needed, strict=True) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return tokens, weights

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.trip.grads = [
            back(grad, ctx.trip.traffic, kind) if needed else None
            for grad, needed, kind in zip(grads, ctx.trip.needed, _GRADIENTS, strict=True)
        ]
        return grads[0], None, None  # of this shape; those that count are on their way


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor, trip: Trip) -> torch.Tensor:
        ctx.trip = trip
        trip.sums = back(sums, trip.traffic, "sums")
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        coming = ctx.trip.grad_sums
        del ctx.trip.grad_sums
        return coming.arrived(), None


class _ComeBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor, inverse: torch.Tensor | None, trip: Trip) -> torch.Tensor:
        ctx.trip = trip
        returned = trip.sums.arrived()
        del trip.sums
        return add_up(returned, inverse, trip.copies)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.trip.grad_sums.rows, None, None  # on their way


class _Answer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, order: torch.Tensor | None, inverse: torch.Tensor | None, trip: Trip
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.trip = trip
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, inverse = ctx.saved_tensors
        traffic = ctx.trip.traffic
        order = None if order is None else order[: sum(traffic.sent)]
        laid_out = lay_out(grads[0], order, inverse, ctx.trip.copies)
        ctx.trip.grad_sums = there(laid_out, traffic, "grad_sums")
        return grads[0], None, None, None
