"""Arithmetic of the mesh: which ranks form each group, without any process group.

Tensor-parallel ranks are consecutive, then come the ranks that hold the other experts: on a machine with
fast links inside a node, the chattiest groups then stay inside it.

| axis | group | what its ranks share |
|---|---|---|
| tp | ``tensor_size`` consecutive ranks | heads, hidden channels, vocabulary; they see the same tokens |
| dp | ranks with the same tp coordinate | the work on a batch; the gradients of everything but experts |
| ep | ``expert_size`` consecutive ranks | the experts of a layer; they exchange tokens |
| edp | ranks with the same ep coordinate | nothing but gradients: they hold the same experts |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rxt_dist.errors import MeshError

Ranks = tuple[int, ...]


class Coordinates(NamedTuple):
    """Position of a rank on every axis, from 0."""

    dp: int
    tp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Mesh:
    """``world_size`` ranks, arranged.

    With ``sequence_parallel`` the ranks of a tensor group also divide the tokens between products.

    Raises:
        MeshError: a size is below 1, or does not divide the number of ranks.
    """

    world_size: int
    tensor_size: int = 1
    expert_size: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise MeshError(f"world size: found {self.world_size} ranks; valid: 1 or more")
        for field in ("tensor_size", "expert_size"):
            size = getattr(self, field)
            if size < 1 or self.world_size % size:
                raise MeshError(
                    f"parallel.{field}: found {size}; must divide the world size ({self.world_size} ranks)"
                )

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tensor_size

    @property
    def expert_data_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.expert_size

    def tensor_groups(self) -> list[Ranks]:
        return _consecutive(self.world_size, self.tensor_size)

    def data_groups(self) -> list[Ranks]:
        return _strided(self.world_size, self.tensor_size)

    def expert_groups(self) -> list[Ranks]:
        return _consecutive(self.world_size, self.expert_size)

    def expert_data_groups(self) -> list[Ranks]:
        return _strided(self.world_size, self.expert_size)

    def coordinates(self, rank: int) -> Coordinates:
        return Coordinates(
            dp=rank // self.tensor_size,
            tp=rank % self.tensor_size,
            ep=rank % self.expert_size,
            edp=rank // self.expert_size,
        )

    def experts_of(self, rank: int, num_experts: int) -> range:
        """Numbers of the experts that ``rank`` holds of every layer's ``num_experts``."""
        count = num_experts // self.expert_size
        first = self.coordinates(rank).ep * count
        return range(first, first + count)


def _consecutive(world_size: int, size: int) -> list[Ranks]:
    return [tuple(range(first, first + size)) for first in range(0, world_size, size)]


def _strided(world_size: int, stride: int) -> list[Ranks]:
    return [tuple(range(first, world_size, stride)) for first in range(stride)]
