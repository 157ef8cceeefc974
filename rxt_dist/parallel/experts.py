"""Experts spread over ranks: every token travels once to each other rank that has one of its experts.

It takes the numbers and weights of its experts along. The rank adds up what its experts make of the token,
and one row goes back; where the token came from, these sums are added. The sizes of messages are told in one
of two ways:

- Where few tokens would stay away from a rank (:func:`rxt_dist.parallel.dispatch.all_travel`), all of them go
  there. Then ranks tell each other how many they have once a pass, and the host waits for no device. For
  the rows of its experts a rank takes the room that they have needed before; when the host hears how many
  there were, it has already given the device all of the layer's products. If the room was too small they are
  done once more, with as much as is needed. The first pass counts first.
- Else the ranks first tell each other how much they will send, and the host waits for those numbers.

What a rank's own experts do for its own tokens needs no message, and is done while messages travel: first
products while the host starts messages, activations while tokens come, second products while sums go back.
The backward pass mirrors this: autograd runs later calls first, so that the gradients of second products are
computed while gradients of sums come, the others while gradients of tokens go back.

Messages go between first products and activations because a grouped product fills the device with blocks that
stay to its end: those that find their place taken by a message start when others are done, and the product
takes twice its time. Kernels of many short blocks lose only the places that the message takes.

Shape legend: N tokens of this rank, K experts of a token, D width, E experts, e experts of this rank, R ranks
of the expert group, s tokens that this rank sends (one that goes to two ranks counts twice), m tokens that it
gets, n rows of its experts: pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._compile import _disable_dynamo

from rxt_dist.kernels.compilation import compiled_kernel
from rxt_dist.kernels.grouped_gemm import grouped_linear
from rxt_dist.kernels.triton_support import uses_triton
from rxt_dist.model.balance import count_experts
from rxt_dist.model.canonical import Cut
from rxt_dist.model.moe import ExpertOrder, Experts
from rxt_dist.parallel.dispatch import all_travel
from rxt_dist.parallel.expert_messages import (
    PassSizes,
    Traffic,
    Trip,
    answered,
    arriving,
    coming_back,
    lay_out,
    sending,
    sending_back,
    there,
    to_host,
)
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.rooms import Rooms, Trial


@dataclass(frozen=True, eq=False)
class Departure:
    """What this rank sends.

    Attributes:
        order: int64 [N * min(R - 1, K)], of which the first s are the tokens for each other rank, rank by
            rank, as slots of the flattened [N, R - 1]. None: all tokens for each rank.
        inverse: int64 [N * (R - 1)], where there is each of these slots; -1: nowhere. None as ``order``.
        counts: int64 [R, 3], for each rank its tokens (of this one none), its experts' rows, and whether this
            rank is active. None as ``order``.
        choices: int32 [N * min(R - 1, K), 2 * K], of the tokens in ``order``, bits of the weights (of fp64
            twice as many) and numbers of the experts; [N * (R - 1), 2 * K] without ``order``.
        chosen: int64 [N, K], numbers of the experts.
        active: whether the pass is one of this rank's (:func:`uneven_passes`).
    """

    order: torch.Tensor | None
    inverse: torch.Tensor | None
    counts: torch.Tensor | None
    choices: torch.Tensor
    chosen: torch.Tensor
    active: bool


class ExpertParallel(Experts):
    """The part of a layer's experts that this rank holds; stands where :class:`Experts` stood.

    What :meth:`visit` takes and returns is the same. Collective over the expert group: every rank of it calls
    at the same time, also with no tokens.

    Args:
        whole: all experts; top_k: K.
        sizes: of the layers that a pass calls one after the other, in the order in which they are made.
        trial: what tries passes; None: nobody does, and the host waits in every layer.
    """

    def __init__(
        self,
        whole: Experts,
        top_k: int,
        mesh: Mesh,
        rank: int,
        group: dist.ProcessGroup,
        sizes: PassSizes,
        trial: Trial | None = None,
    ) -> None:
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
        self.all_travel = all_travel(total, top_k, mesh.expert_size)
        self._sizes, self._asks = sizes, sizes.add_layer()
        self.rooms = Rooms(min(top_k, len(held)))
        self.trial = trial

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
        agree = self.start(x, leaving)
        # If the host waits, the device has this to do.
        laid_out = lay_out(x.detach(), leaving.order, leaving.inverse, self.group.size() - 1)
        trip = Trip(agree())
        meeting = Meeting(self, x, weights.dtype, leaving, trip.traffic)
        coming = sending(x, weights, leaving.inverse, trip)
        entered = self.enter(x, meeting.own, self.top_k)
        trip.send(laid_out)
        hidden = self.hidden(entered, meeting.own)
        others, others_weights = arriving(coming, meeting.weights, trip)
        sums = self(others, meeting.others, others_weights)
        if meeting.outgrown():
            hidden = self.hidden(self.enter(x, meeting.own, self.top_k), meeting.own)
            sums = self(others, meeting.others, others_weights)
        sums = sending_back(sums, trip)
        rows = grouped_linear(hidden, self.w_out, meeting.own.offsets)
        returned = coming_back(sums, leaving.inverse, trip)
        out = self.combine(rows, meeting.own, weights, returned)
        return answered(out, leaving.order, leaving.inverse, trip), trip.traffic.any_active

    @compiled_kernel
    def depart(self, chosen: torch.Tensor, weights: torch.Tensor, *, active: bool) -> Departure:
        """What goes where, of tokens that chose the experts ``chosen`` [N, K] with ``weights`` [N, K]."""
        held, top_k = self.w_in.shape[0], self.top_k
        others, own = self.total_experts // held - 1, self.first_expert // held
        chosen, weights = chosen.flatten().view(-1, top_k), weights.flatten().view(-1, top_k)  # a known width
        if self.all_travel:
            choices = torch.cat([weights.view(torch.int32), chosen.int()], dim=1)
            return Departure(None, None, None, choices.repeat(others, 1), chosen, active)
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
        choices = torch.cat([weights.view(torch.int32)[tokens], chosen[tokens].int()], dim=1)
        return Departure(order, sorted_ways.inverse, torch.stack(counts, dim=1), choices, chosen, active)

    def start(self, x: torch.Tensor, leaving: Departure) -> Callable[[], Traffic]:
        """Begin to tell the others how much of ``x`` [N, D] they will get; the result knows. Collective."""
        if leaving.counts is not None:
            return Traffic.start(leaving.counts, self.group)
        if self._asks:
            self._sizes.ask(x.shape[0], active=leaving.active)
            choice = leaving.choices.shape[1] * leaving.choices.element_size()
            self._sizes.open_peers(self.group, x.device, x.shape[1] * x.element_size(), choice)
        return lambda: self._sizes.traffic(self.group)

    def arrive(self, choices: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [m, K] of tokens that have come, and numbers int32 [m, K] of their experts."""
        weights, chosen = choices[:, : -self.top_k], choices[:, -self.top_k :]
        return weights.contiguous().view(dtype), chosen


class Meeting:
    """Rows of this rank's experts in one pass: of its own tokens, and of those that come. Collective.

    Attributes:
        own, others: both in the order of experts, perhaps with room behind them.
        weights: [m, K], of the tokens that come.
    """

    def __init__(
        self,
        experts: ExpertParallel,
        x: torch.Tensor,
        dtype: torch.dtype,
        leaving: Departure,
        traffic: Traffic,
    ) -> None:
        self._held, self._expected = experts.held, experts.rooms
        self._tokens = x.shape[0], sum(traffic.received)
        rooms = traffic.rows
        if rooms is None and uses_triton(x):
            rooms = self._expected.of(self._tokens)
        travelling = there(leaving.choices, traffic, "choices")
        self.own = ExpertOrder.of_some(leaving.chosen, self._held, rooms and rooms[0])
        self.weights, came = experts.arrive(travelling.arrived(), dtype)
        self.others = ExpertOrder.of_some(came, self._held, rooms and rooms[1])
        self._chosen = leaving.chosen, came
        self._rooms = rooms
        self._counted: Callable[[], list[list[int]]] | None = None
        if traffic.rows is None:
            self._counted = to_host(torch.cat([self.own.count, self.others.count]))
        if rooms is None:
            self.outgrown()
        elif experts.trial is not None and self._counted is not None and experts.trial.defer(self._check()):
            self._counted = None

    def _check(self) -> Callable[[], bool]:
        """What waits for the number of rows, and tells whether there is room for them."""
        counted, expected, tokens, rooms = self._counted, self._expected, self._tokens, self._rooms
        assert counted is not None
        assert rooms is not None

        def fits() -> bool:
            (rows,) = counted()
            expected.learn(tokens, rows)
            return rows[0] <= rooms[0] and rows[1] <= rooms[1]

        return fits

    def outgrown(self) -> bool:
        """Whether there are more rows than there is room for; then there is enough from now on. Here the host
        waits for their number, unless it was told, or will be asked at the end of the pass."""
        if self._counted is None or (self._rooms is not None and self._check()()):
            return False
        (rows,) = self._counted()
        self._counted = None
        if self._rooms is None:
            self._expected.learn(self._tokens, rows)
            self.own, self.others = self.own.first(rows[0]), self.others.first(rows[1])
        else:
            self.own, self.others = (
                ExpertOrder.of_some(chosen, self._held, count)
                for chosen, count in zip(self._chosen, rows, strict=True)
            )
        return True


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
