"""Initial parameters: each tensor from its own generator, keyed by its canonical name.

So they depend neither on the order in which modules are built nor on how tensors are fused or spread
over ranks: a rank that holds experts 8 to 15 draws exactly those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from rxt_dist.model.canonical import canonical_map
from rxt_dist.randomness import derive_key


@dataclass(frozen=True)
class Normal:
    """N(mean, std²)."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape).normal_(self.mean, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape).uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.full(shape, self.value)


Distribution = Normal | Uniform | Constant


def linear_default(fan_in: int) -> Uniform:
    """What weight and bias of a linear layer start from: U(±1/sqrt(fan_in))."""
    return Uniform(1.0 / math.sqrt(fan_in))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter of ``model`` in place, as a pure function of ``seed`` and canonical names.

    A module states what its parameters start from in ``initial_distributions()``: names relative to it, of
    parameters or of canonical parts of fused ones -> distribution; linear, embedding and norm layers have
    defaults. A module with the attribute
    ``first_expert`` holds stacked experts from that number on, and each is drawn by itself.

    Raises:
        ValueError: a parameter belongs to no known kind of module and no module states its distribution.
    """
    names = canonical_map(model)
    distributions = dict(_distributions(model))
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name not in distributions:
            raise ValueError(f"no initial distribution for parameter {name}")
        owner = modules[name.rpartition(".")[0]]
        first = getattr(owner, "first_expert", None)
        if first is not None:
            for index, expert in enumerate(parameter.unbind(0)):
                _draw(expert, distributions[name], derive_key(seed, "init", name, first + index))
            continue
        for part, (canonical, _) in zip(
            torch.split(parameter, [size for _, size in names[name]]), names[name], strict=True
        ):
            distribution = distributions.get(canonical, distributions[name])
            _draw(part, distribution, derive_key(seed, "init", canonical))


def _draw(target: torch.Tensor, distribution: Distribution, key: int) -> None:
    target.copy_(distribution.draw(target.shape, torch.Generator().manual_seed(key)))


def _distributions(model: nn.Module) -> Iterator[tuple[str, Distribution]]:
    """(parameter name, distribution), outer modules last so that their statement wins."""
    for prefix, module in reversed(list(model.named_modules())):
        for name, distribution in {**_defaults(module), **_stated(module)}.items():
            yield (f"{prefix}.{name}" if prefix else name), distribution


def _stated(module: nn.Module) -> dict[str, Distribution]:
    state = getattr(module, "initial_distributions", None)
    return {} if state is None else state()


def _defaults(module: nn.Module) -> dict[str, Distribution]:
    if isinstance(module, nn.Linear):
        return dict.fromkeys(("weight", "bias"), linear_default(module.in_features))
    if isinstance(module, nn.Embedding):
        return {"weight": Normal()}
    if isinstance(module, nn.LayerNorm):
        return {"weight": Constant(1.0), "bias": Constant(0.0)}
    return {}
