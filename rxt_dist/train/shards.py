"""Where DeepSpeed keeps what one rank owns of the optimizer state, for every ZeRO stage.

Each group of parameters has one flat fp32 tensor a rank, the masters, and moments of its shape. With ZeRO 1
and 2 the group's parameters lie end to end and every rank owns a run of the whole; with ZeRO 3 every
parameter is cut over the ranks by itself, and a rank's cuts lie end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's flattened values.

    Attributes:
        start: first element of the run in the parameter; first: where that is in the shard; count: elements.
    """

    parameter: nn.Parameter
    start: int
    first: int
    count: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The run, as a view of the shard's masters or of moments of their shape."""
        return flat.detach()[self.first : self.first + self.count]


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank owns of one group of parameters.

    Attributes:
        group: the optimizer's settings for it; flat: fp32 masters, with padding; pieces: what they are of.
        state: step counter and moments, to be filled by the optimizer or by :meth:`create_moments`.
    """

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    flat: torch.Tensor
    pieces: list[Piece]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Step counter and moments by name."""
        found: dict[str, torch.Tensor] = self.optimizer.state[self.flat]
        return found

    def create_moments(self) -> None:
        """Zero moments, as the optimizer's first step would make them."""
        on_device = self.group.get("fused") or self.group.get("capturable")
        self.optimizer.state[self.flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=self.flat.device if on_device else "cpu"),
            "exp_avg": torch.zeros_like(self.flat),
            "exp_avg_sq": torch.zeros_like(self.flat),
        }


def owned_shards(zero: Any) -> list[Shard]:
    """The shards of this rank; ``zero`` is DeepSpeed's ZeRO optimizer."""
    make = _cut_parameters if hasattr(zero, "fp32_partitioned_groups_flat") else _cut_groups
    return [Shard(zero.optimizer, *parts) for parts in make(zero)]


Parts = tuple[dict[str, Any], torch.Tensor, list[Piece]]


def _cut_groups(zero: Any) -> Iterator[Parts]:
    """ZeRO 1 and 2."""
    flats = zero.single_partition_of_fp32_groups
    for group, parameters, flat in zip(zero.param_groups, zero.bit16_groups, flats, strict=True):
        pieces = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else other ranks own all of it
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append(Piece(parameter, low.start, high.start, high.numel))
        yield group, flat, pieces


def _cut_parameters(zero: Any) -> Iterator[Parts]:
    """ZeRO 3; a group of more than ``sub_group_size`` elements has several flat tensors."""
    rank = torch.distributed.get_rank()
    for number, (parameters, flat) in enumerate(
        zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    ):
        pieces, first = [], 0
        for parameter in parameters:
            start, count = part_of_rank(parameter.ds_numel, rank, torch.distributed.get_world_size())
            if count > 0:
                pieces.append(Piece(parameter, start, first, count))
            first += parameter.partition_numel()
        yield zero.param_groups[zero.sub_group_to_group_id[number]], flat, pieces


def part_of_rank(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """First element and number of elements that ``rank`` has of a parameter cut by ZeRO 3."""
    size = -(-numel // ranks)
    start = min(rank * size, numel)
    return start, min(size, numel - start)
