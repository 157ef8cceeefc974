"""Mixture of experts between tensor-parallel ranks: routed by tokens, shared ones by hidden channels.

All ranks of a group route all tokens alike. Each sends its own slice of them through the routed experts, so
that none is computed twice; then the slices are joined.

Shape legend: N tokens, n tokens of this rank's slice, D embedding width, S shared experts, K experts a token
visits, f hidden channels held here of each shared expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from rxt_dist.model.canonical import Box, Cut
from rxt_dist.model.feedforward import FeedForward, activate
from rxt_dist.model.initialisation import Distribution
from rxt_dist.model.moe import MoE, Routing, SharedExperts, expert_distributions
from rxt_dist.parallel.regions import enter_parts, join_slices, leave_parts, slice_of, take_slice
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
        vars(self).update(vars(whole))
        self._parameters, self._modules = dict(whole._parameters), dict(whole._modules)
        self._tensor = tensor
        if isinstance(self.shared, SharedExperts):
            self.shared = TensorSharedExperts(self.shared, tensor)
        elif self.shared is not None:
            split_feed_forward(self.shared, tensor)

    def run_experts(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        group, loads = self._tensor.ranks, self.loads
        own = slice_of(x.shape[0], group)
        part = replace(routing, weights=take_slice(routing.weights, group), experts=routing.experts[own])
        self.loads = None  # each rank counts all tokens, as its data-parallel peers do
        out = super().run_experts(take_slice(x, group), part)
        self.loads = loads
        if loads is not None:
            chosen = routing.experts.flatten()
            loads.index_add_(0, chosen, torch.ones_like(chosen))
        return join_slices(out, x.shape[0], group)


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
        group = self._tensor.ranks
        hidden = torch.matmul(enter_parts(x, group), self.w_in.transpose(1, 2))  # [S, N, inner]
        if self.b_in is not None:
            hidden = hidden + self.b_in[:, None]
        out = torch.matmul(activate(hidden, self.activation, self.gated), self.w_out.transpose(1, 2))
        weights = share.to(out.dtype)
        mixed = leave_parts((out * enter_parts(weights, group).T[..., None]).sum(dim=0), group)
        if self.b_out is not None:
            mixed = mixed + weights @ self.b_out
        if self.output_bias is not None:
            mixed = mixed + self.output_bias
        return mixed, deviation
