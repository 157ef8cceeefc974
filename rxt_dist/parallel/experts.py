"""Experts spread over ranks: every token travels to the rank of its expert and back.

Rows arrive sorted by expert, so what each rank gets is one run of them. The ranks first tell each other how
many rows each expert will get; those numbers are the only thing the host waits for. Then rows are exchanged
in uneven runs, sorted by expert again, computed, and sent back along the same way.

Shape legend: n rows of this rank, m rows that its experts get, D width, E experts, e experts of this rank,
R ranks of the expert group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rxt_dist.kernels.combine import combine_rows
from rxt_dist.kernels.grouped_gemm import add_group_bias
from rxt_dist.kernels.permute import permute_rows, place_rows, repeat_permuted
from rxt_dist.model.canonical import Cut
from rxt_dist.model.moe import ExpertOrder, Experts
from rxt_dist.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Traffic:
    """How many rows go where in one exchange.

    Attributes:
        sent, received: rows to and from every rank of the group, on the host.
        local_experts: int64 [m], expert of this rank that each received row is for.
        any_active: whether a rank of the group called in a pass of its own (see :func:`uneven_passes`).
    """

    sent: list[int]
    received: list[int]
    local_experts: torch.Tensor
    any_active: bool

    @classmethod
    def agree(cls, offsets: torch.Tensor, group: dist.ProcessGroup, *, active: bool) -> Traffic:
        """Tell every rank what it will get. Collective; the one point where the host waits for the device.

        ``offsets``: int32 [E], end of each expert's run in the rows of this rank.
        """
        ranks = group.size()
        counts = torch.diff(offsets.long(), prepend=offsets.new_zeros(1, dtype=torch.int64)).view(ranks, -1)
        outgoing = torch.cat([counts, counts.new_full((ranks, 1), int(active))], dim=1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        counted = incoming[:, :-1]
        sent, received, flags = torch.stack([counts.sum(1), counted.sum(1), incoming[:, -1]]).tolist()
        numbers = torch.arange(counted.shape[1], device=offsets.device).repeat(ranks)
        local = torch.repeat_interleave(numbers, counted.flatten(), output_size=sum(received))
        return cls(sent, received, local, any(flags))


class ExpertParallel(Experts):
    """The part of a layer's experts that this rank holds; stands where :class:`Experts` stood.

    Forward takes and returns what :class:`Experts` does, with ``order`` that of all E experts, wherever the
    outputs are computed. Collective over the expert group: every rank of it calls at the same time, also with
    no tokens.
    """

    def __init__(self, whole: Experts, mesh: Mesh, rank: int, group: dist.ProcessGroup) -> None:
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
        self.total_experts = total
        self.group = group

    def cuts(self) -> dict[str, list[Cut]]:
        held = range(self.first_expert, self.first_expert + self.w_in.shape[0])
        return {
            name: [Cut.along(0, (self.total_experts, *parameter.shape[1:]), held)]
            for name, parameter in self.named_parameters()
        }

    def forward(self, x: torch.Tensor, order: ExpertOrder, weights: torch.Tensor) -> torch.Tensor:
        rows = repeat_permuted(x, order.order, order.inverse, weights.shape[1])
        rows = self._through_all(rows, Traffic.agree(order.offsets, self.group, active=True))
        return combine_rows(
            rows, None, weights, order.order, order.inverse, order.offsets, order.expert_of_row
        )

    def serve(self) -> bool:
        """Compute for the others in one call of theirs; whether any of them had a pass of its own."""
        offsets = torch.zeros(self.total_experts, dtype=torch.int32, device=self.w_in.device)
        traffic = Traffic.agree(offsets, self.group, active=False)
        self._through_all(self.w_in.new_empty(0, self.w_in.shape[2]), traffic)
        return traffic.any_active

    def _through_all(self, x: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        rows = exchange(x, traffic.sent, traffic.received, self.group)
        order = ExpertOrder.of(traffic.local_experts, self.w_in.shape[0])
        rows = permute_rows(rows, order.order, order.inverse)
        rows = self.products(rows, order)
        if self.b_out is not None:
            rows = add_group_bias(rows, self.b_out, order.offsets, order.expert_of_row)
        rows = place_rows(rows, order.order, order.inverse)
        return exchange(rows, traffic.received, traffic.sent, self.group)


def exchange(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send consecutive runs of ``rows`` [n, D] to the ranks of ``group``; returns what came, by rank.

    The gradient travels the same way back. Collective, also where there is nothing to send.
    """
    out: torch.Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
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
