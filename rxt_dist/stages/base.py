"""What every stage offers the trainer: a module that turns a micro-batch into sums, and who trains.

A stage never divides: it returns sums over its micro-batch, each with the name of the global count that
the trainer divides by. The gradient is then the same for every division of the step into ranks and
micro-batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rxt_dist.config import RunConfig
from rxt_dist.model import SequenceLayout
from rxt_dist.randomness import derive_key, fold_in_tensor, signed_key
from rxt_dist.stages.expert_statistics import count_loads, load_statistics

NEVER = math.inf
"""Start of a component that does not train in a stage at all."""


@dataclass(frozen=True)
class Term:
    """One summed quantity of a micro-batch.

    ``total`` is a scalar (fp32 or integer), ``count`` the key of the count it is divided by.
    """

    total: torch.Tensor
    count: str


class StageModule(nn.Module, ABC):
    """The parts of the model that a stage runs, wrapped for the engine.

    Only submodules the stage uses are registered, so that the engine neither moves nor casts the rest.
    """

    weights: dict[str, float]
    """Factor in the loss of every term, by metric name; 0 for one that is only reported. The order is that
    of the metric vector and is known before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, float] = {}
        """Optimizer step of the stage from which a component trains, by the name of the submodule: 0 where
        it is not listed, NEVER for one that is frozen throughout."""
        self.step = 0
        """The optimizer step of the stage that is computed now."""
        self.zero_gradients = True
        """Whether parameters that are still frozen get gradients of zero in training; the engine decides."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @abstractmethod
    def run(self, batch: Any, stm: torch.Tensor | None) -> tuple[dict[str, Term], torch.Tensor | None]:
        """Sums of one micro-batch by metric name (exactly ``metric_names``), and the STM to carry on.

        ``stm`` [L, lanes, S, D] is what the lanes of the micro-batch carried here; None, as is the one
        returned, in stages without lanes.
        """

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Registered parameters that take no part in training: those of components that never start.

        A parameter of two components (the embedding) starts with the earlier of them.
        """
        starts = self._parameter_starts()
        return (parameter for parameter in self.parameters() if starts[parameter] == NEVER)

    def parameter_groups(self) -> dict[int, list[nn.Parameter]]:
        """Trainable parameters by the step of the stage from which they train, ascending."""
        starts = self._parameter_starts()
        groups: dict[int, list[nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups.setdefault(int(starts[parameter]), []).append(parameter)
        return dict(sorted(groups.items()))

    @property
    def weight_dtype(self) -> torch.dtype:
        """In what parameters are computed with."""
        return next(self.parameters()).dtype

    def trains(self, component: str) -> bool:
        """Whether the parameters of ``component`` are updated in the present step."""
        return self.starts.get(component, 0) <= self.step

    @abstractmethod
    def local_counts(self, batch: Any) -> dict[str, int]:
        """What the micro-batch adds to each count that ``terms`` divides by."""

    @property
    @abstractmethod
    def generates(self) -> bool:
        """Whether the stage has a decoder that can continue a text."""

    def next_token_logits(self, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """Logits [B, V] of the token after each of the B sequences in ``tokens`` [N]; if it generates."""
        raise NotImplementedError

    def router_terms(self, balance: torch.Tensor, z: torch.Tensor) -> dict[str, Term]:
        """The routers' sums over tokens that the stage has weights for, see :func:`router_weights`."""
        sums = {"aux_loss": balance, "z_loss": z}
        return {name: Term(total, "tokens") for name, total in sums.items() if name in self.weights}

    def observe(self, device: torch.device | None) -> None:
        """From now on collect what :meth:`observations` reports, on ``device``; None: stop it."""
        count_loads(self, device)

    def observations(self, counts: Mapping[str, int]) -> dict[str, float | None]:
        """Statistics of the optimizer step since :meth:`observe`, over all ranks; ``counts`` are the global
        ones of the step. Collective. Waits for the device."""
        return load_statistics(self)

    def forward(
        self, batch: Any, counts: Mapping[str, int], stm: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Loss of one micro-batch and its metrics, both as shares of the global step.

        ``counts`` are the global counts of the step. Returns the scalar loss and the metric vector
        [1 + len(metric_names)] (the loss first), and the STM to carry on; summed over all micro-batches
        and ranks loss and metrics are the step's values. A count of zero contributes zero.
        """
        terms, carried = self.run(batch, stm)
        shares = {
            name: terms[name].total.float() / max(1, counts[terms[name].count]) for name in self.weights
        }
        loss = torch.stack([shares[name] * weight for name, weight in self.weights.items()]).sum()
        metrics = torch.stack([loss.detach(), *(share.detach() for share in shares.values())])
        if self.zero_gradients and any(self.step < start < NEVER for start in self.starts.values()):
            groups = self.parameter_groups().items()
            waiting = [parameter for start, group in groups if start > self.step for parameter in group]
            loss = _WithZeroGradients.apply(loss, *waiting)  # type: ignore[no-untyped-call]
        return loss, metrics, carried

    def freeze(self) -> None:
        """Take the frozen parameters out of training; must precede the engine."""
        for parameter in list(self.frozen_parameters()):
            parameter.requires_grad_(False)

    def call(self, component: str, *arguments: Any) -> Any:
        """The result of a component, or of a part of it as ``decoder.lm_head``, whose parameters get no
        gradient while the component is frozen; its inputs do."""
        module = self.get_submodule(component)
        if self.trains(component.partition(".")[0]) or not torch.is_grad_enabled():
            return module(*arguments)
        with _constant(module):
            return module(*arguments)

    def _parameter_starts(self) -> dict[nn.Parameter, float]:
        starts: dict[nn.Parameter, float] = {}
        for name, component in self.named_children():
            for parameter in component.parameters():
                start = self.starts.get(name, 0)
                starts[parameter] = min(start, starts.get(parameter, NEVER))
        return starts


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of ``module`` take no part in the graph. They stay what they are, so that an
    engine that partitions them still finds them."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:  # recomputation stops early by an exception
        for parameter in trainable:
            parameter.requires_grad_(True)


class _WithZeroGradients(torch.autograd.Function):
    """The loss, with a gradient of zero for parameters that are still frozen: the engine reduces gradients
    in buckets and expects one of every parameter that it owns."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def uses(components: str, part: str) -> bool:
    """Whether a stage's ``components`` setting includes ``part`` (``encoder`` or ``decoder``)."""
    return components in ("joint", part)


def layer_keys(token_keys: torch.Tensor, purpose: str, layers: int) -> torch.Tensor:
    """One key for every layer and token: int64 [L, N]."""
    bases = fold_in_tensor(token_keys, signed_key(derive_key(purpose)))
    return fold_in_tensor(bases.unsqueeze(0), torch.arange(layers, device=bases.device).unsqueeze(1))


def router_weights(config: RunConfig, decoder_scale: float) -> dict[str, float]:
    """Weights of the routers' losses by metric name; empty for a model without any."""
    moe = config.model.decoder.moe
    if moe is None:
        return {}
    balance = 0.0 if moe.aux_loss == "none" else moe.aux_loss_scale
    weights = {"aux_loss": balance, "z_loss": moe.z_loss_weight}
    return {name: decoder_scale * weight for name, weight in weights.items() if weight}
