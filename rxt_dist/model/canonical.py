"""Canonical tensors: what parameters are made of, and how much of each this process holds.

Modules fuse projections that read the same input, and a rank may hold a part of a tensor. Checkpoints and
initial values speak of whole, unfused tensors, because rows of a fused tensor cut over ranks would belong to
different projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

Pieces = dict[str, list[tuple[str, int]]]
"""Parameter name -> [(name of the canonical tensor, rows of the parameter that belong to it)], in order."""


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of ``module`` by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class Box(NamedTuple):
    """A part of a tensor: where it begins in every dimension, and its sizes."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


class Cut(NamedTuple):
    """What a parameter holds of one canonical tensor of the given whole shape: boxes, one after the other."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def along(cls, dim: int, shape: tuple[int, ...], held: range) -> Cut:
        """The entries ``held`` of dimension ``dim``, and all of the others."""
        starts = tuple(held.start if axis == dim else 0 for axis in range(len(shape)))
        sizes = tuple(len(held) if axis == dim else size for axis, size in enumerate(shape))
        return cls(shape, (Box(starts, sizes),) if held else ())


@dataclass(frozen=True)
class CanonicalPart:
    """A run of a parameter's flat values, which is a box of a canonical tensor in the same order."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole canonical tensor."""
    start: int
    """Where the run begins in the parameter."""
    box: Box

    @property
    def numel(self) -> int:
        """Elements of the whole canonical tensor."""
        return math.prod(self.shape)

    @property
    def held(self) -> int:
        """Elements of the run."""
        return self.box.numel

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The run, as a view of the parameter's flat values."""
        return flat[self.start : self.start + self.held]

    def taken_from(self, whole: torch.Tensor) -> torch.Tensor:
        """The flat values of the run out of those of the whole canonical tensor (of any shape)."""
        view = whole.reshape(self.shape)
        for dim, (start, size) in enumerate(zip(*self.box, strict=True)):
            view = view.narrow(dim, start, size)
        return view.reshape(-1)


def canonical_parts(model: nn.Module) -> dict[str, list[CanonicalPart]]:
    """Map the name of every parameter and buffer of ``model`` to the canonical tensors it holds, in storage
    order.

    Shared parameters appear once, under the first name ``named_parameters`` gives them. A module says in
    ``canonical_parts()`` which canonical tensors its fused parameters consist of (:data:`Pieces`, names
    relative to it, also of parameters of its submodules), and one that holds a part of whole tensors says in
    ``cuts()`` which: parameter name -> one :class:`Cut` for each of its canonical tensors. What a parameter
    holds beyond its cuts is padding, behind them.
    """
    pieces: Pieces = {}
    cuts: dict[str, list[Cut]] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, found in _asked(module, "canonical_parts").items():
            pieces[dot + name] = [(dot + piece, rows) for piece, rows in found]
        cuts.update({dot + name: found for name, found in _asked(module, "cuts").items()})
    return {
        name: _parts(name, tensor, pieces.get(name), cuts.get(name))
        for name, tensor in named_tensors(model).items()
    }


def _asked(module: nn.Module, method: str) -> dict:  # type: ignore[type-arg]
    answer = getattr(module, method, None)
    return {} if answer is None else answer()


def _parts(
    name: str, parameter: torch.Tensor, pieces: list[tuple[str, int]] | None, cuts: list[Cut] | None
) -> list[CanonicalPart]:
    shape = tuple(parameter.shape) or (1,)
    pieces = pieces or [(name, shape[0])]
    if cuts is None:
        assert sum(rows for _, rows in pieces) == shape[0], f"{name}: pieces do not cover the parameter"
        cuts = [Cut.along(0, (rows, *shape[1:]), range(rows)) for _, rows in pieces]
    found, start = [], 0
    for (piece, _), cut in zip(pieces, cuts, strict=True):
        for box in cut.boxes:
            found.append(CanonicalPart(piece, cut.shape, start, box))
            start += box.numel
    assert start <= parameter.numel(), f"{name}: its canonical parts are larger than the parameter"
    return found
