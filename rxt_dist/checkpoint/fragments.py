"""Pieces of tensors, as torch's distributed checkpoint (DCP) sees them.

ZeRO gives every rank a contiguous run of the flattened parameters, and of a tensor that tensor-parallel
ranks share a parameter is a box. A :class:`Fragment` describes what a rank holds of one tensor as boxes of
it: DCP stores each of them and reshards on load, so saving needs no communication and any other division of
the tensor can read it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
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

from rxt_dist.model.canonical import Box, CanonicalPart

Chunk = tuple[tuple[int, ...], torch.Tensor]
"""Where a box of a tensor begins, and its values in its shape."""


@dataclass(frozen=True)
class Fragment:
    """Boxes that a rank holds of a tensor of the given whole shape, as views that loading writes through."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @classmethod
    def run(cls, numel: int, offset: int, values: torch.Tensor) -> Fragment:
        """``values`` [n] are the elements ``offset .. offset + n`` of a tensor of shape [``numel``]."""
        return cls((numel,), (((offset,), values),))

    def size(self) -> torch.Size:
        """Shape of the whole tensor as stored; DCP compares it with the file on load."""
        return torch.Size(self.shape)

    def flat(self) -> Fragment:
        """The same boxes of the flattened tensor, cut into runs."""
        chunks = [run for offsets, values in self.chunks for run in _flat_runs(self.shape, offsets, values)]
        return Fragment((math.prod(self.shape),), tuple(chunks))

    def at(self, index: MetadataIndex) -> torch.Tensor:
        """The values of the box that begins where ``index`` says."""
        assert index.offset is not None
        return next(values for offsets, values in self.chunks if offsets == tuple(index.offset))

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(values), size=self.size()
                ),
            )
            for chunk, (_, values) in zip(self.__create_chunk_list__(), self.chunks, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=values.shape)
            for offsets, values in self.chunks
        ]


class FragmentSavePlanner(DefaultSavePlanner):
    """DCP's own planner, told where a fragment keeps its values."""

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        fragment: Fragment = self.state_dict[index.fqn]
        return fragment.at(index)


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
        return fragment.at(index)


def clip_fragment(part: CanonicalPart, start: int, values: torch.Tensor) -> Fragment | None:
    """What ``values`` (flat elements ``start ..`` of the parameter) hold of the tensor of ``part``."""
    low = max(start, part.start)
    high = min(start + values.numel(), part.start + part.held)
    if low >= high:
        return None
    position, chunks = low - start, []
    for box in boxes_of_run(part.box.sizes, low - part.start, high - part.start):
        offsets = tuple(a + b for a, b in zip(part.box.starts, box.starts, strict=True))
        chunks.append((offsets, values[position : position + box.numel].view(box.sizes)))
        position += box.numel
    return Fragment(part.shape, tuple(chunks))


def add_fragment(found: dict[str, Fragment], key: str, fragment: Fragment) -> None:
    """Put ``fragment`` under ``key``, beside what is there of the same tensor."""
    before = found.get(key)
    found[key] = fragment if before is None else Fragment(fragment.shape, before.chunks + fragment.chunks)


def boxes_of_run(sizes: tuple[int, ...], low: int, high: int) -> Iterator[Box]:
    """The elements ``low .. high`` (not none) of a flattened tensor of ``sizes`` as boxes of it, in order."""
    if len(sizes) == 1:
        yield Box((low,), (high - low,))
        return
    row = math.prod(sizes[1:])
    first, last = -(-low // row), high // row  # whole rows
    if low < first * row:
        yield from _within_row(sizes, low, min(high, first * row))
    if first < last:
        yield Box((first, *(0 for _ in sizes[1:])), (last - first, *sizes[1:]))
    if max(last, first) * row < high:
        yield from _within_row(sizes, max(last * row, low), high)


def _within_row(sizes: tuple[int, ...], low: int, high: int) -> Iterator[Box]:
    row = math.prod(sizes[1:])
    for box in boxes_of_run(sizes[1:], low % row, low % row + high - low):
        yield Box((low // row, *box.starts), (1, *box.sizes))


def _flat_runs(shape: tuple[int, ...], offsets: tuple[int, ...], values: torch.Tensor) -> Iterator[Chunk]:
    """The runs of a flattened tensor of ``shape`` that the box ``values`` at ``offsets`` consists of."""
    inner = len(shape)  # from this dimension on the box has all of the tensor
    while inner > 0 and values.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(0, inner - 1)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    for place in product(*(range(size) for size in values.shape[:outer])):
        position = (*place, *(0 for _ in shape[outer:]))
        offset = sum((o + p) * s for o, p, s in zip(offsets, position, strides, strict=True))
        yield (offset,), values[place].view(-1)
