"""Dropless top-k mixture of experts.

Every token visits its K experts whatever their load: tokens are sorted by expert and each expert
multiplies its run of rows in one grouped product.

Shape legend: N tokens, D embedding width, E routed experts, K experts a token visits, n = N * K rows,
F hidden width of an expert, S shared experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn

from rxt_dist.config import MoEConfig
from rxt_dist.kernels.activation import Activation, activate, activate_rows
from rxt_dist.kernels.combine import combine_rows
from rxt_dist.kernels.grouped_gemm import grouped_linear
from rxt_dist.kernels.permute import repeat_permuted
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton
from rxt_dist.model.balance import RouterSums, count_experts, load_shares, switch_loss, z_loss
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.initialisation import Constant, Distribution, Normal, linear_default

if HAS_TRITON:
    from rxt_dist.kernels.order_triton import counting_sort
    from rxt_dist.kernels.router_triton import route

_EXPERT_STD = 0.02
ExpertInit = Literal["normal", "linear"]
_WEIGHT_EPS = 1e-9


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in fp32 or wider."""
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Routing:
    """Where tokens go.

    Attributes:
        weights: fp32 [N, K], summing to 1 over K; experts: int64 [N, K].
        chosen_mass: fp32 [N], probability that the router gave to the chosen experts together.
        logits: [N, E].
    """

    weights: torch.Tensor
    experts: torch.Tensor
    chosen_mass: torch.Tensor
    logits: torch.Tensor

    @property
    def probabilities(self) -> torch.Tensor:
        """fp32 [N, E], computed anew: only one of the balance losses wants all of them."""
        return _softmax(self.logits)


@dataclass(frozen=True, eq=False)
class ExpertOrder:
    """Rows sorted by expert; n = N * K of them, or fewer where some slots of [N, K] have none.

    Attributes:
        order: int64 [n], row i of the sorted rows is slot ``order[i]`` of the flattened [N, K].
        inverse: int64 [N * K], the row of each slot; -1: it has none.
        expert_of_row: int64 [n], ascending; offsets: int32 [E], the end of each expert's run.
        count: int32 [1], rows that there would be with room for all.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    expert_of_row: torch.Tensor
    offsets: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, experts: torch.Tensor, num_experts: int) -> ExpertOrder:
        """Sort int64 expert numbers of any shape (flattened to [n]), stably, without a host sync."""
        if uses_triton(experts):
            return cls(*counting_sort(experts, num_experts))
        expert_of_row, order = torch.sort(experts.flatten(), stable=True)
        rows = torch.arange(order.shape[0], device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, rows)
        numbers = torch.arange(num_experts, device=order.device)
        offsets = torch.searchsorted(expert_of_row, numbers, right=True, out_int32=True)
        return cls(order, inverse, expert_of_row, offsets, offsets[-1:])

    @classmethod
    def of_some(cls, experts: torch.Tensor, held: range, room: int | None = None) -> ExpertOrder:
        """Sort the slots of which the expert is one of ``held``, numbered from 0, and leave out the others.

        Rows beyond the last offset, of the other slots, mean nothing.

        Args:
            experts: int64 or int32 of any shape (flattened to [N * K]).
            room: n, the most rows; slots that find no room are left out. None: N * K.
        """
        if uses_triton(experts):
            found = cls(*counting_sort(experts, len(held), held.start, others=True, room=room))
        else:
            numbers = experts - held.start
            kept = (numbers >= 0) & (numbers < len(held))
            every = cls.of(torch.where(kept, numbers, len(held)).long(), len(held) + 1)
            count, most = every.offsets[-2:-1], experts.numel() if room is None else room
            inverse = torch.where(every.inverse < count.clamp_max(most), every.inverse, -1)
            offsets = every.offsets[:-1].clamp_max(most)
            found = cls(every.order, inverse, every.expert_of_row, offsets, count)
        return found if room is None else found.first(room)

    def first(self, count: int) -> ExpertOrder:
        """The first ``count`` rows, behind which there is none."""
        return replace(self, order=self.order[:count], expert_of_row=self.expert_of_row[:count])


def expert_distributions(init: ExpertInit, width: int, hidden: int) -> dict[str, Distribution]:
    """What stacked expert tensors start from, by name."""
    if init == "linear":
        first, second = linear_default(width), linear_default(hidden)
        return {"w_in": first, "b_in": first, "w_out": second, "b_out": second}
    weight, bias = Normal(std=_EXPERT_STD), Constant(0.0)
    return {"w_in": weight, "b_in": bias, "w_out": weight, "b_out": bias}


class _AlignedLinear(nn.Linear):
    """A linear map without bias, zeros behind its outputs: x [N, I] -> [N, O, rounded up to a multiple of 8].

    cuBLAS has fast products of 16-bit numbers for rows of whole 16 bytes only; so are then those of the
    forward pass and both of the backward pass.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.pad(self.weight, (0, 0, 0, -self.out_features % 8)))


class Router(nn.Module):
    """Softmax over all experts in fp32, the K largest, renormalised. x [N, D] -> :class:`Routing`.

    With a selection bias the K largest sums of probability and bias are chosen; their weights are made of the
    probabilities alone. The bias is no parameter: training moves it by the loads of the experts.
    """

    selection_bias: torch.Tensor | None
    """fp32 [E] whatever the dtype of the weights: its steps are finer than bf16."""

    def __init__(self, width: int, num_experts: int, top_k: int, *, biased: bool = False) -> None:
        super().__init__()
        self.top_k = top_k
        self.num_experts = num_experts
        self.proj = _AlignedLinear(width, num_experts, bias=False)
        self.register_buffer("selection_bias", torch.zeros(num_experts) if biased else None)

    def reset_statistics(self) -> None:
        """Start the selection bias anew, from 0."""
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        exact = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        applied = self.selection_bias
        if exact is not None and applied is not None and applied.dtype != exact.dtype:
            self.selection_bias = exact.to(applied.device)  # moved with the weights, but not cast with them
        return self

    def forward(self, x: torch.Tensor) -> Routing:
        aligned = self.proj(x)
        logits = aligned[:, : self.num_experts]
        if uses_triton(logits):
            chosen = route(aligned, self.selection_bias, self.num_experts, self.top_k, _WEIGHT_EPS)
            return Routing(*chosen, logits)
        probabilities = _softmax(logits)
        if self.selection_bias is None:
            top, experts = probabilities.topk(self.top_k, dim=-1)
        else:
            experts = (probabilities.detach() + self.selection_bias).topk(self.top_k, dim=-1).indices
            top = probabilities.gather(1, experts)
        mass = top.sum(dim=-1)
        return Routing(top / (mass[:, None] + _WEIGHT_EPS), experts, mass, logits)


class Experts(nn.Module):
    """E stacked feed-forwards, each for the tokens that chose it.

    Args of forward:
        x: [N, D]; weights: fp32 [N, K], of the outputs of the experts that each token chose.
        order: of these experts, or of those of them that are here.

    Returns the weighted sums of the outputs, [N, D].
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        gated: bool,
        activation: Activation,
        biased: bool,
        init: ExpertInit = "normal",
    ) -> None:
        super().__init__()
        self.init = init
        self.gated, self.activation = gated, activation
        self.first_expert = 0  # number of the first expert held here
        inner = 2 * hidden if gated else hidden
        self.w_in = nn.Parameter(torch.empty(num_experts, inner, width))
        self.w_out = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.b_in = nn.Parameter(torch.empty(num_experts, inner)) if biased else None
        self.b_out = nn.Parameter(torch.empty(num_experts, width)) if biased else None

    def initial_distributions(self) -> dict[str, Distribution]:
        return expert_distributions(self.init, self.w_in.shape[2], self.w_out.shape[2])

    def visit(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Forward for tokens [N, D] that chose the experts ``chosen``, int64 [N, K]."""
        out: torch.Tensor = self(x, ExpertOrder.of(chosen, self.w_in.shape[0]), weights)
        return out

    def forward(self, x: torch.Tensor, order: ExpertOrder, weights: torch.Tensor) -> torch.Tensor:
        return self.leave(self.hidden(self.enter(x, order, weights.shape[1]), order), order, weights)

    def enter(self, x: torch.Tensor, order: ExpertOrder, copies: int) -> torch.Tensor:
        """First products [n, W] for the rows of ``x``, each of which has K = ``copies``; W is F, or 2F where
        gated."""
        rows = repeat_permuted(x, order.order, order.inverse, copies)
        return grouped_linear(rows, self.w_in, order.offsets)

    def hidden(self, entered: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        """Hidden channels [n, F] of ``entered`` [n, W]."""
        return activate_rows(
            entered, self.b_in, order.offsets, order.expert_of_row, self.activation, self.gated
        )

    def leave(self, hidden: torch.Tensor, order: ExpertOrder, weights: torch.Tensor) -> torch.Tensor:
        """What forward returns, of ``hidden`` [n, F]."""
        return self.combine(grouped_linear(hidden, self.w_out, order.offsets), order, weights)

    def combine(
        self,
        rows: torch.Tensor,
        order: ExpertOrder,
        weights: torch.Tensor,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sums [N, D] of second products [n, D], added to ``base`` [N, D]."""
        where = order.order, order.inverse, order.offsets, order.expert_of_row
        return combine_rows(rows, self.b_out, weights, *where, base)


class SharedExperts(nn.Module):
    """S > 1 experts that every token visits, mixed by a softmax gate.

    x [N, D] -> (mixture [N, D], fp32 [N] deviation ``mean_s |g_s - 1/S|`` of the gate from uniform).
    """

    def __init__(
        self,
        count: int,
        width: int,
        hidden: int,
        *,
        gated: bool,
        activation: Activation,
        bias: str,
        init: ExpertInit = "normal",
    ) -> None:
        super().__init__()
        self.init = init
        self.gated, self.activation = gated, activation
        inner = 2 * hidden if gated else hidden
        self.w_in = nn.Parameter(torch.empty(count, inner, width))
        self.w_out = nn.Parameter(torch.empty(count, width, hidden))
        self.b_in = nn.Parameter(torch.empty(count, inner)) if bias == "local" else None
        self.b_out = nn.Parameter(torch.empty(count, width)) if bias == "local" else None
        self.output_bias = nn.Parameter(torch.empty(width)) if bias == "global" else None
        self.gate = nn.Linear(width, count, bias=False)

    def initial_distributions(self) -> dict[str, Distribution]:
        experts = expert_distributions(self.init, self.w_in.shape[2], self.w_out.shape[2])
        return {**experts, "output_bias": Constant(0.0)}

    def shares(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of every expert in the mixture, fp32 [N, S], and the deviation from uniform."""
        share = _softmax(self.gate(x))
        return share, (share - 1.0 / share.shape[1]).abs().mean(dim=-1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share, deviation = self.shares(x)
        weights = share.to(x.dtype)
        count, inner, _ = self.w_in.shape
        # The experts are one wide one, whose hidden channels have shares. As a batch of products, autograd
        # would have the hidden rows transposed.
        bias = None if self.b_in is None else self.b_in.flatten()
        hidden = F.linear(x, self.w_in.flatten(0, 1), bias).view(-1, count, inner)
        hidden = activate(hidden, self.activation, self.gated) * weights[..., None]
        mixed = hidden.flatten(1) @ self.w_out.transpose(1, 2).flatten(0, 1)
        if self.b_out is not None:
            mixed = mixed + weights @ self.b_out
        if self.output_bias is not None:
            mixed = mixed + self.output_bias
        return mixed, deviation


class MoE(nn.Module):
    """Routed experts, plus shared ones where configured.

    x [N, D] -> (output [N, D], :class:`RouterSums`). The balance value of a token is, by ``aux_loss``:
    reference, (E/K) times the probability mass of its chosen experts (1 to E/K), plus the deviation of the
    shared experts' gate where there are several; switch, that of :func:`switch_loss`.
    """

    def __init__(
        self, config: MoEConfig, width: int, hidden: int, *, gated: bool, activation: Activation
    ) -> None:
        super().__init__()
        self.config = config
        self.loads: torch.Tensor | None = None
        """int64 [E], to which every pass adds the tokens of each expert; None: nobody wants to know."""
        self.shares: torch.Tensor | None = None
        """fp32 [E], shares of the experts that the switch loss takes in training; None, and in evaluation:
        those of the pass itself."""
        self.router = Router(
            width, config.num_experts, config.top_k, biased=config.bias_update_rate is not None
        )
        self.experts = Experts(
            config.num_experts,
            width,
            hidden,
            gated=gated,
            activation=activation,
            biased=config.bias == "local",
            init=config.expert_init,
        )
        self.output_bias = nn.Parameter(torch.empty(width)) if config.bias == "global" else None
        self.shared: FeedForward | SharedExperts | None = None
        shared_hidden = config.shared_expert_dim or hidden
        if config.num_shared_experts == 1:
            self.shared = FeedForward(width, shared_hidden, gated=gated, activation=activation)
        elif config.num_shared_experts > 1:
            self.shared = SharedExperts(
                config.num_shared_experts,
                width,
                shared_hidden,
                gated=gated,
                activation=activation,
                bias=config.shared_bias,
                init=config.expert_init,
            )

    def initial_distributions(self) -> dict[str, Distribution]:
        return {"output_bias": Constant(0.0)}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, RouterSums]:
        routing = self.route(x)
        shared, losses = self.beside(x, routing)
        return self.join(self.run_experts(x, routing), shared), losses

    def route(self, x: torch.Tensor) -> Routing:
        """Where the tokens ``x`` [N, D] go."""
        routing: Routing = self.router(x)
        if self.loads is not None:
            self.loads += self.loads_of(routing)
        return routing

    def beside(self, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor | None, RouterSums]:
        """All but the routed experts: what shared ones make of ``x`` [N, D], and the losses of the router."""
        shared: torch.Tensor | None = None
        deviation: torch.Tensor | None = None
        if isinstance(self.shared, FeedForward):
            shared = self.shared(x)
        elif self.shared is not None:
            shared, deviation = self.shared(x)
        z = z_loss(routing.logits) if self.config.z_loss_weight > 0 else None
        return shared, RouterSums(self._balance(routing, deviation), z)

    def join(self, routed: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        """The output, of what routed and shared experts make of the tokens, both [N, D]."""
        if self.output_bias is not None:
            routed = routed + self.output_bias
        if shared is None:
            return routed
        if not self.config.weighted_shared_experts:
            return routed + shared
        routed_count, shared_count = self.config.top_k, self.config.num_shared_experts
        total = routed_count + shared_count
        return routed * (routed_count / total) + shared * (shared_count / total)

    def _balance(self, routing: Routing, deviation: torch.Tensor | None) -> torch.Tensor | None:
        """Sum over tokens of the balance value; ``deviation`` [N] of the shared experts' gate."""
        experts, chosen = self.config.num_experts, self.config.top_k
        if self.config.aux_loss == "none":
            return None
        if self.config.aux_loss == "switch":
            if not self.training or self.shares is None:
                shares = load_shares(self.loads_of(routing))
            else:
                shares = self.shares
            return switch_loss(routing.probabilities, shares)
        balance = routing.chosen_mass * (experts / chosen)
        return (balance if deviation is None else balance + deviation).sum()

    def loads_of(self, routing: Routing) -> torch.Tensor:
        """How many of the tokens of a pass chose each expert: int64 [E]."""
        return count_experts(routing.experts, self.config.num_experts)

    def run_experts(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Send ``x`` [N, D] through the chosen experts and sum their weighted outputs, [N, D]."""
        return self.collect(self.experts.visit(*self.deal(x, routing)), x.shape[0])

    def deal(self, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those of the tokens ``x`` [N, D] that this process sends through experts, and their experts."""
        return x, routing.experts, routing.weights

    def collect(self, out: torch.Tensor, count: int) -> torch.Tensor:
        """The rows of all N = ``count`` tokens, from those of the tokens that :meth:`deal` gave."""
        return out
