"""Initial parameters: each tensor from its own generator, keyed by its canonical name.

So they depend neither on the order in which modules are built nor on how tensors are fused or spread
over ranks: a rank that holds experts 8 to 15 draws exactly those, and one that holds a part of a tensor draws
all of it and keeps that part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from rxt_dist.model.canonical import Box, CanonicalPart, canonical_parts
from rxt_dist.randomness import derive_key


@dataclass(frozen=True)
class Normal:
    """N(mean, std²)."""

    mean: float = 0.0
    std: float = 1.0

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        out.normal_(self.mean, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        out.uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        out.fill_(self.value)


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
    parts = canonical_parts(model)
    distributions = dict(_distributions(model))
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name not in distributions:
            raise ValueError(f"no initial distribution for parameter {name}")
        owner = modules[name.rpartition(".")[0]]
        first = getattr(owner, "first_expert", None)
        if first is not None:
            (part,) = parts[name]
            entry = CanonicalPart(name, part.shape[1:], 0, Box(part.box.starts[1:], part.box.sizes[1:]))
            for index, target in enumerate(parameter.unbind(0)):
                _draw(target, [entry], distributions[name], derive_key(seed, "init", name, first + index))
            continue
        if sum(part.held for part in parts[name]) < parameter.numel():
            parameter.zero_()  # padding
        for canonical, held in groupby(parts[name], key=lambda part: part.name):
            distribution = distributions.get(canonical, distributions[name])
            _draw(parameter, list(held), distribution, derive_key(seed, "init", canonical))


def _draw(target: torch.Tensor, parts: list[CanonicalPart], distribution: Distribution, key: int) -> None:
    """Fill the ``parts`` of ``target``, all of one canonical tensor, which is drawn whole."""
    generator, flat = torch.Generator().manual_seed(key), target.view(-1)
    if parts[0].held == parts[0].numel and target.dtype == torch.float32:
        distribution.fill(parts[0].of(flat).view(parts[0].shape), generator)
        return
    whole = torch.empty(parts[0].shape)
    distribution.fill(whole, generator)
    for part in parts:
        part.of(flat).copy_(part.taken_from(whole))


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
