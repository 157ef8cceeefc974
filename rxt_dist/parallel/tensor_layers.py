"""Linear maps and the embedding, shared by tensor-parallel ranks: Megatron-core's layers, whose linear maps
compute by :mod:`rxt_dist.parallel.regions`.

A column-parallel map holds some of its outputs, a row-parallel one some of its inputs (Shoeybi et al., 2019:
Megatron-LM). Which ones they are of the whole map is what :meth:`cuts` says; that is all that initial values
and checkpoints need. Groups are handed over, so that Megatron-core's own process-wide state is not used.

Shape legend: N rows, I inputs, O outputs of the whole map, i and o those held here, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from rxt_dist.model.canonical import Cut
from rxt_dist.model.initialisation import Distribution, linear_default
from rxt_dist.model.stacked import StackedLinear
from rxt_dist.parallel.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    get_pg_size,
)
from rxt_dist.parallel.regions import (
    enter_parts,
    entered_products,
    gather_slices,
    gathered_products,
    leave_parts,
    scatter_parts,
)


class Pass:
    """The pass of encoder or decoder that runs now, of whose rows each rank has a slice between products.

    Numbers are kept as sizes of tensors without values: the compiler takes a number that a module has for
    one that does not change.
    """

    def __init__(self) -> None:
        self._tokens = self._read = torch.empty(0, 0)

    @property
    def tokens(self) -> int:
        """Those of all slices; the embedding, with which every pass begins, sets them."""
        return self._tokens.shape[0]

    @tokens.setter
    def tokens(self, rows: int) -> None:
        self._tokens = torch.empty(rows, 0)

    @property
    def read(self) -> int:
        """Rows that each layer reads of a memory, or memory attention of the encoder, of all slices; the
        decoder and memory attention set them."""
        return self._read.shape[0]

    @read.setter
    def read(self, rows: int) -> None:
        self._read = torch.empty(rows, 0)


class TensorRank(NamedTuple):
    """This rank among those that share tensors. ``group`` is None where nothing is computed, as in plans.

    ``sliced`` is None where every rank has all tokens between products.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None
    sliced: Pass | None = None

    @property
    def ranks(self) -> dist.ProcessGroup:
        assert self.group is not None
        return self.group

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens [N, ...] of which the ranks compute parts, of the rows that this one has."""
        if self.sliced is None:
            return enter_parts(x, self.ranks)
        return gather_slices(x, self.sliced.tokens, self.ranks)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The rows that this rank goes on with of the sum of the ranks' ``x`` [N, ...]."""
        return leave_parts(x, self.ranks) if self.sliced is None else scatter_parts(x, self.ranks)

    def products(
        self, x: torch.Tensor, matrices: Sequence[torch.Tensor], *, of_memory: bool = False
    ) -> Sequence[torch.Tensor]:
        """``enter(x) @ matrix.mT`` for each of ``matrices`` [o, I] or [L, o, I]; gathered rows are not kept.

        ``x`` [N, I] or [L, N, I] are tokens, or with ``of_memory`` what a layer reads besides its tokens.
        """
        if self.sliced is None:
            return entered_products(x, matrices, self.ranks)
        count = self.sliced.read if of_memory else self.sliced.tokens
        return gathered_products(x, matrices, count, self.ranks)

    def part_of(self, total: int) -> range:
        """The consecutive entries of ``total`` that this rank holds; all ranks hold equally many."""
        count = total // self.size
        return range(self.rank * count, (self.rank + 1) * count)


def _megatron_config(tensor: TensorRank) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor.size,
        # Parameters are made on the device of the surrounding context, without values.
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Some outputs of a linear map. x [N, I] -> [N, o].

    ``whole`` is the map, ``held`` the outputs of each of the canonical tensors that it consists of, of
    ``rows`` outputs each. x are the rows that this rank has of the tokens, or of a memory (``of_memory``).
    """

    def __init__(
        self,
        whole: nn.Linear,
        rows: Sequence[int],
        held: Sequence[range],
        tensor: TensorRank,
        *,
        of_memory: bool = False,
    ) -> None:
        outputs = sum(len(part) for part in held)
        with whole.weight.device:
            super().__init__(
                whole.in_features,
                outputs * get_pg_size(tensor.group),
                bias=whole.bias is not None,
                config=_megatron_config(tensor),
                init_method=_no_values,
                tp_group=tensor.group,
            )
        self.in_features, self.out_features = whole.in_features, outputs
        self._pieces = list(zip(rows, held, strict=True))
        self._tensor, self._of_memory = tensor, of_memory

    def matrix(self) -> torch.Tensor:
        """What it multiplies by: [o, I]."""
        weight: torch.Tensor = self.weight
        return weight

    def cuts(self) -> dict[str, list[Cut]]:
        found = {"weight": [Cut.along(0, (rows, self.in_features), held) for rows, held in self._pieces]}
        if self.bias is not None:
            found["bias"] = [Cut.along(0, (rows,), held) for rows, held in self._pieces]
        return found

    def initial_distributions(self) -> dict[str, Distribution]:
        return dict.fromkeys(("weight", "bias"), linear_default(self.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (own,) = self._tensor.products(x, [self.weight], of_memory=self._of_memory)
        return own if self.bias is None else own + self.bias


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """A linear map of which every rank has some of the inputs. x [N, i] -> [N, O], the same on all ranks, or
    the rank's slice [n, O]."""

    def __init__(self, whole: nn.Linear, held: range, tensor: TensorRank) -> None:
        with whole.weight.device:
            super().__init__(
                len(held) * get_pg_size(tensor.group),
                whole.out_features,
                bias=whole.bias is not None,
                config=_megatron_config(tensor),
                init_method=_no_values,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=tensor.group,
            )
        self.in_features, self.out_features = len(held), whole.out_features
        self._whole_inputs, self._held = whole.in_features, held
        self._tensor = tensor

    def partial_parameters(self) -> list[str]:
        return ["bias"] if self.bias is not None and self._tensor.sliced is not None else []

    def cuts(self) -> dict[str, list[Cut]]:
        return {"weight": [Cut.along(1, (self.out_features, self._whole_inputs), self._held)]}

    def initial_distributions(self) -> dict[str, Distribution]:
        return dict.fromkeys(("weight", "bias"), linear_default(self._whole_inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self._tensor.leave(F.linear(x, self.weight))
        return own if self.bias is None else own + self.bias


class VocabEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Rows of an embedding. int64 [N] -> [N, D], the same on all ranks, or the rank's slice [n, D].

    Ranks hold equally many rows; those beyond the vocabulary are zeros that no token looks up.
    """

    def __init__(self, whole: nn.Embedding, tensor: TensorRank) -> None:
        rows = vocabulary_part(whole.num_embeddings, tensor)
        with whole.weight.device:
            super().__init__(
                len(rows) * get_pg_size(tensor.group),
                whole.embedding_dim,
                config=_megatron_config(tensor),
                init_method=_no_values,
                tp_group=tensor.group,
            )
        self._vocabulary, self._held, self._tensor = whole.num_embeddings, rows, tensor

    def cuts(self) -> dict[str, list[Cut]]:
        held = real_rows(self._vocabulary, self._held)
        return {"weight": [Cut.along(0, (self._vocabulary, self.embedding_dim), held)]}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._tensor.sliced is not None:
            self._tensor.sliced.tokens = tokens.shape[0]
            elsewhere = (tokens < self._held.start) | (tokens >= self._held.stop)
            rows = F.embedding((tokens - self._held.start).masked_fill(elsewhere, 0), self.weight)
            return self._tensor.leave(rows.masked_fill(elsewhere[:, None], 0.0))
        out: torch.Tensor = super().forward(tokens)
        return out


def vocabulary_part(vocabulary: int, tensor: TensorRank) -> range:
    """The rows of a vocabulary that this rank holds, padded so that all ranks hold equally many."""
    count = -(-vocabulary // tensor.size)
    return range(tensor.rank * count, (tensor.rank + 1) * count)


def real_rows(vocabulary: int, rows: range) -> range:
    """Those of ``rows`` that are not padding."""
    return range(min(rows.start, vocabulary), min(rows.stop, vocabulary))


class SharedHeads(nn.Linear):
    """Some heads of a projection whose whole weight every rank has: heads of it are read by several ranks.

    x [N, I], which are the rows that this rank has of a memory, -> [N, pieces * heads * d]. The gradient of
    the weight is this rank's share of it.
    """

    def __init__(
        self, whole: nn.Linear, pieces: int, head_width: int, heads: Sequence[int], tensor: TensorRank
    ) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device=whole.weight.device)
        self._pieces, self._head_width, self._heads = pieces, head_width, heads
        self._tensor = tensor

    def partial_parameters(self) -> list[str]:
        return ["weight"]

    def matrix(self) -> torch.Tensor:
        """What it multiplies by: [pieces * heads * d, I]."""
        weight = self.weight.view(self._pieces, -1, self._head_width, self.in_features)
        return pick_heads(weight, self._heads).reshape(-1, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (out,) = self._tensor.products(x, [self.matrix()], of_memory=True)
        return out


class JoinedLinear(nn.Module):
    """Two projections of the same input, joined."""

    def __init__(self, first: ColumnLinear | SharedHeads, second: ColumnLinear | SharedHeads) -> None:
        super().__init__()
        self.first, self.second = first, second

    def matrix(self) -> torch.Tensor:
        """What it multiplies by: [o of the first + o of the second, I]."""
        return torch.cat([self.first.matrix(), self.second.matrix()])


class StackedColumn(StackedLinear):
    """Some outputs of one linear map a layer."""

    def __init__(self, whole: StackedLinear, held: range) -> None:
        layers, self._outputs, inputs = whole.weight.shape
        with whole.weight.device:
            super().__init__(layers, inputs, len(held), bias=whole.bias is not None)
        self._held = held

    def matrix(self) -> torch.Tensor:
        """What it multiplies by: [L, o, I]."""
        return self.weight

    def cuts(self) -> dict[str, list[Cut]]:
        layers, _, inputs = self.weight.shape
        found = {"weight": [Cut.along(1, (layers, self._outputs, inputs), self._held)]}
        if self.bias is not None:
            found["bias"] = [Cut.along(1, (layers, self._outputs), self._held)]
        return found


class StackedRow(StackedLinear):
    """One linear map a layer, of which every rank has some inputs. x [L, R, i] -> [L, R, O] on all ranks."""

    def __init__(self, whole: StackedLinear, held: range, tensor: TensorRank) -> None:
        layers, outputs, self._inputs = whole.weight.shape
        with whole.weight.device:
            super().__init__(layers, len(held), outputs, bias=whole.bias is not None)
        self._held, self._tensor = held, tensor

    def cuts(self) -> dict[str, list[Cut]]:
        layers, outputs, _ = self.weight.shape
        return {"weight": [Cut.along(2, (layers, outputs, self._inputs), self._held)]}

    def initial_distributions(self) -> dict[str, Distribution]:
        return dict.fromkeys(("weight", "bias"), linear_default(self._inputs))

    def product(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return leave_parts(super().product(x, dtype), self._tensor.ranks)


class StackedSharedHeads(StackedLinear):
    """Some heads of one projection a layer whose whole weights every rank has. See :class:`SharedHeads`."""

    def __init__(self, whole: StackedLinear, head_width: int, heads: Sequence[int]) -> None:
        layers, outputs, inputs = whole.weight.shape
        with whole.weight.device:
            super().__init__(layers, inputs, outputs, bias=False)
        self._head_width, self._heads = head_width, heads

    def partial_parameters(self) -> list[str]:
        return ["weight"]

    def matrix(self) -> torch.Tensor:
        """What it multiplies by: [L, heads * d, I]."""
        layers, _, inputs = self.weight.shape
        weight = pick_heads(self.weight.view(layers, -1, self._head_width, inputs), self._heads)
        return weight.reshape(layers, -1, inputs)


def pick_heads(values: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """``values[:, heads]`` for numbers on the host, without a copy of them to the device."""
    first = heads[0]
    if list(heads) == list(range(first, first + len(heads))):
        return values[:, first : first + len(heads)]
    return torch.cat([values[:, head : head + 1] for head in heads], dim=1)


def _no_values(_: torch.Tensor) -> None:
    """Values come from :mod:`rxt_dist.model.initialisation`."""
