"""Flat pieces of tensors, as torch's distributed checkpoint (DCP) sees them.

ZeRO gives every rank a contiguous run of the flattened parameters, so what a rank owns of one tensor
is a run of its flattened values. A :class:`Fragment` describes that run: DCP stores each as a
one-dimensional chunk of a tensor of ``numel`` values and reshards on load, so saving needs no
communication and any other division of the tensor can read it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from rxt_dist.model.canonical import canonical_map


@dataclass(frozen=True)
class Fragment:
    """``values`` [n] are the flattened elements ``offset .. offset + n`` of a tensor of ``numel``."""

    numel: int
    offset: int
    values: torch.Tensor

    def size(self) -> torch.Size:
        """Shape of the whole tensor as stored; DCP compares it with the file on load."""
        return torch.Size([self.numel])

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(
            offsets=torch.Size([self.offset]), sizes=torch.Size([self.values.numel()])
        )

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        chunk = self._chunk()
        data = TensorWriteData(
            chunk=chunk, properties=TensorProperties.create_from_tensor(self.values), size=self.size()
        )
        return [
            WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]


class FragmentSavePlanner(DefaultSavePlanner):
    """DCP's own planner, told where a fragment keeps its values."""

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        fragment: Fragment = self.state_dict[index.fqn]
        return fragment.values


class FragmentLoadPlanner(DefaultLoadPlanner):
    """DCP's own planner, told where a fragment keeps its values."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The inherited method would take the fragments apart as nested dataclasses.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        fragment: Fragment = self.state_dict[index.fqn]
        return fragment.values


@dataclass(frozen=True)
class CanonicalPart:
    """What a parameter or buffer holds of one canonical tensor: a contiguous run of the flat values of both.

    A fused parameter holds several canonical tensors, one of spread experts a run of one.
    """

    name: str
    shape: tuple[int, ...]
    """Shape of the whole canonical tensor."""
    start: int
    """Where the run begins in the parameter."""
    held: int
    """Elements of the run."""
    offset: int = 0
    """Where the run begins in the canonical tensor."""

    @property
    def numel(self) -> int:
        """Elements of the whole canonical tensor."""
        return int(torch.Size(self.shape).numel())

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The run, as a view of the parameter's flat values."""
        return flat[self.start : self.start + self.held]


def canonical_parts(module: torch.nn.Module) -> dict[str, list[CanonicalPart]]:
    """Map the name of every parameter and buffer of ``module`` to the canonical tensors it holds, in storage
    order.

    Shared parameters appear once, under the first name ``named_parameters`` gives them. A module with the
    attribute ``total_experts`` holds of so many only its own, from ``first_expert`` on.
    """
    fused = canonical_map(module)
    owners = dict(module.named_modules())
    result: dict[str, list[CanonicalPart]] = {}
    for name, parameter in module.named_parameters():
        row = parameter.numel() // max(1, parameter.shape[0]) if parameter.dim() else 1
        owner = owners[name.rpartition(".")[0]]
        total = getattr(owner, "total_experts", None)
        if total is not None:
            shape = (total, *parameter.shape[1:])
            result[name] = [CanonicalPart(name, shape, 0, parameter.numel(), owner.first_expert * row)]
            continue
        entries, start = [], 0
        for part_name, rows in fused[name]:
            entries.append(CanonicalPart(part_name, (rows, *parameter.shape[1:]), start, rows * row))
            start += rows * row
        assert start == parameter.numel(), f"{name}: canonical parts do not cover the parameter"
        result[name] = entries
    for name, buffer in module.named_buffers():
        result[name] = [CanonicalPart(name, tuple(buffer.shape), 0, buffer.numel())]
    return result


def clip_fragment(part: CanonicalPart, start: int, values: torch.Tensor) -> Fragment | None:
    """What ``values`` (flat elements ``start ..`` of the parameter) hold of the tensor of ``part``."""
    low = max(start, part.start)
    high = min(start + values.numel(), part.start + part.held)
    if low >= high:
        return None
    return Fragment(part.numel, part.offset + low - part.start, values[low - start : high - start])
