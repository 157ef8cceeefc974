"""Mixture of experts between tensor-parallel ranks: routed by tokens, shared ones by hidden channels.

All ranks of a group route all tokens alike. Each sends its own slice of them through the routed experts, so
that none is computed twice; then the slices are joined. Where ranks have slices of the tokens anyway, each
routes and sends its own.

Shape legend: N tokens, or this rank's slice of them, n tokens of that slice, D embedding width, S shared
experts, K experts a token visits, f hidden channels held here of each shared expert.
"""

from __future__ import annotations

import torch
from torch import nn

from rxt_dist.kernels.activation import activate
from rxt_dist.model.canonical import Box, Cut
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.initialisation import Distribution
from rxt_dist.model.moe import MoE, Routing, SharedExperts, expert_distributions
from rxt_dist.parallel.regions import join_slices, slice_of, summed, take_slice
from rxt_dist.parallel.stand_in import take_over
from rxt_dist.parallel.tensor_layers import ColumnLinear, RowLinear, TensorRank


def split_feed_forward(layer: FeedForward, tensor: TensorRank) -> None:
    """Leave in ``layer`` the hidden channels of one rank."""
    hidden = layer.out_proj.in_features
    held, pieces = tensor.part_of(hidden), 2 if layer.gated else 1
    layer.in_proj = ColumnLinear(layer.in_proj, [hidden] * pieces, [held] * pieces, tensor)
    layer.out_proj = RowLinear(layer.out_proj, held, tensor)


class SlicedMoE(MoE):
    """``whole`` between tensor-parallel ranks; stands where it stood.

    Its routed experts are whole, or spread over an expert group; every rank brings its own tokens.
    """

    def __init__(self, whole: MoE, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._tensor = tensor
        if isinstance(self.shared, SharedExperts):
            self.shared = TensorSharedExperts(self.shared, tensor)
        elif self.shared is not None:
            split_feed_forward(self.shared, tensor)

    def partial_parameters(self) -> list[str]:
        if self._tensor.sliced is None:
            return []
        return ["router.proj.weight"] + ["output_bias"] * (self.output_bias is not None)

    def loads_of(self, routing: Routing) -> torch.Tensor:
        own = super().loads_of(routing)
        return own if self._tensor.sliced is None else summed(own, self._tensor.ranks)

    def deal(self, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._tensor.sliced is not None:
            return super().deal(x, routing)
        group = self._tensor.ranks
        own = slice_of(x.shape[0], group)
        return take_slice(x, group), routing.experts[own], take_slice(routing.weights, group)

    def collect(self, out: torch.Tensor, count: int) -> torch.Tensor:
        return out if self._tensor.sliced is not None else join_slices(out, count, self._tensor.ranks)


class TensorSharedExperts(SharedExperts):
    """Some hidden channels of every shared expert. x [N, D] -> what :class:`SharedExperts` gives."""

    def __init__(self, whole: SharedExperts, tensor: TensorRank) -> None:
        count, width, self._hidden = whole.w_out.shape
        self._tensor, self._held = tensor, tensor.part_of(self._hidden)
        with whole.w_in.device:
            super().__init__(
                count,
                width,
                len(self._held),
                gated=whole.gated,
                activation=whole.activation,
                bias="local"
                if whole.b_in is not None
                else "global"
                if whole.output_bias is not None
                else "off",
                init=whole.init,
            )

    def partial_parameters(self) -> list[str]:
        if self._tensor.sliced is None:
            return []
        copies = {"gate.weight": self.gate.weight, "b_out": self.b_out, "output_bias": self.output_bias}
        return [name for name, parameter in copies.items() if parameter is not None]

    def cuts(self) -> dict[str, list[Cut]]:
        count, width, held = self.w_out.shape
        halves = 2 if self.gated else 1
        inner = halves * self._hidden
        starts = [(s, half * self._hidden + self._held.start) for s in range(count) for half in range(halves)]
        found = {
            "w_in": [Cut((count, inner, width), tuple(Box((*at, 0), (1, held, width)) for at in starts))],
            "w_out": [Cut.along(2, (count, width, self._hidden), self._held)],
        }
        if self.b_in is not None:
            found["b_in"] = [Cut((count, inner), tuple(Box(at, (1, held)) for at in starts))]
        return found

    def initial_distributions(self) -> dict[str, Distribution]:
        own = expert_distributions(self.init, self.w_in.shape[2], self._hidden)
        return {**super().initial_distributions(), **own}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share, deviation = self.shares(x)
        count, inner, _ = self.w_in.shape
        (hidden,) = self._tensor.products(x, [self.w_in.flatten(0, 1)])
        hidden = hidden.view(-1, count, inner)
        if self.b_in is not None:
            hidden = hidden + self.b_in
        weights = share.to(x.dtype)
        hidden = activate(hidden, self.activation, self.gated) * self._tensor.enter(weights)[..., None]
        mixed = self._tensor.leave(hidden.flatten(1) @ self.w_out.transpose(1, 2).flatten(0, 1))
        if self.b_out is not None:
            mixed = mixed + weights @ self.b_out
        if self.output_bias is not None:
            mixed = mixed + self.output_bias
        return mixed, deviation
