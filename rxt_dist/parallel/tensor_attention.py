"""Attention whose heads are dealt out over tensor-parallel ranks.

The larger of query heads and key/value heads is dealt out evenly. The other side follows where it divides
too; where it does not (fewer key/value heads than ranks, or reverse sparse query attention, whose query heads
are each read by key/value heads far apart), every rank has all its weights and computes the heads that it
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from rxt_dist.config.base import divisors
from rxt_dist.model.attention import CrossAttention, SelfAttention, TokenAttention
from rxt_dist.model.memory_attention import StackedAttention
from rxt_dist.parallel.regions import enter_parts
from rxt_dist.parallel.stand_in import take_over
from rxt_dist.parallel.tensor_layers import (
    ColumnLinear,
    JoinedLinear,
    RowLinear,
    SharedHeads,
    StackedColumn,
    StackedRow,
    StackedSharedHeads,
    TensorRank,
)


class Side(NamedTuple):
    """The query or the key/value heads that a rank computes.

    Attributes:
        total: of the whole attention; numbers: those of this rank, in its order, some perhaps twice.
        dealt: whether every head is on one rank only.
    """

    total: int
    numbers: list[int]
    dealt: bool

    def rows(self, head_width: int) -> range:
        """Rows of the projection that the heads are; of a side that is dealt out."""
        return range(self.numbers[0] * head_width, (self.numbers[-1] + 1) * head_width)


def deal_heads(query_heads: int, kv_heads: int, rank: int, size: int) -> tuple[Side, Side]:
    """Query and key/value heads of ``rank`` among ``size`` ranks.

    ``size`` divides the larger number. On each rank heads belong together as in a whole attention: with more
    query heads, query head h reads ``h * Hk // Hq``, else key/value head g is read by ``g % Hq``.
    """
    larger, smaller = max(query_heads, kv_heads), min(query_heads, kv_heads)
    count = larger // size
    own = list(range(rank * count, (rank + 1) * count))
    reverse = query_heads < kv_heads
    partners = [head % smaller if reverse else head * smaller // larger for head in own]
    dealt = larger == smaller or (not reverse and smaller % size == 0)
    large, small = Side(larger, own, True), Side(smaller, _fewest(partners, reverse), dealt)
    return (small, large) if reverse else (large, small)


def _fewest(partners: list[int], reverse: bool) -> list[int]:
    """The shortest list of heads that gives every head its partner by the rule of :func:`deal_heads`."""
    heads = len(partners)
    for count in divisors(heads):
        chosen = partners[:count] if reverse else partners[:: heads // count]
        if partners == [chosen[h % count if reverse else h * count // heads] for h in range(heads)]:
            return chosen
    raise AssertionError("the list itself always does")


class _Dealt(nn.Module):
    """What the attentions below have in common; mixed into the attention that they replace."""

    _tensor: TensorRank

    def partial_parameters(self) -> list[str]:
        """Head norms are copies, of which each rank sees its heads."""
        return [f"{name}.weight" for name in ("query_norm", "key_norm") if getattr(self, name) is not None]


class _DealtTokens(_Dealt, TokenAttention):
    """The same where queries are tokens."""

    def _map(self, x: torch.Tensor, maps: Sequence[Any]) -> Sequence[torch.Tensor]:
        return self._tensor.products(x, [one.matrix() for one in maps])


def _share_outputs(
    part: TensorSelfAttention | TensorCrossAttention, query: Side, kv: Side, tensor: TensorRank
) -> None:
    """Heads, gate and output projection of one rank."""
    width = part.head_width
    part.query_heads, part.kv_heads = len(query.numbers), len(kv.numbers)
    held = max(query, kv, key=lambda side: side.total).rows(width)
    gate = part.gate
    if gate is not None:
        part.gate = ColumnLinear(gate, [gate.out_features], [held], tensor)
    part.out = RowLinear(part.out, held, tensor)


def _projection(
    whole: nn.Linear, sides: Sequence[Side], head_width: int, tensor: TensorRank, *, of_memory: bool = False
) -> ColumnLinear | SharedHeads:
    """The heads of ``sides``, one for each canonical tensor of ``whole``, that a rank computes."""
    if all(side.dealt for side in sides):
        rows = [side.total * head_width for side in sides]
        held = [side.rows(head_width) for side in sides]
        return ColumnLinear(whole, rows, held, tensor, of_memory=of_memory)
    return SharedHeads(whole, len(sides), head_width, sides[0].numbers, tensor)


class TensorSelfAttention(_DealtTokens, SelfAttention):
    """Some heads of ``whole``; stands where it stood."""

    def __init__(self, whole: SelfAttention, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._tensor = tensor
        query, kv = deal_heads(whole.query_heads, whole.kv_heads, tensor.rank, tensor.size)
        self._whole_rows = [side.total * self.head_width for side in (query, kv, kv)]
        self.qkv: Any
        if query.dealt and kv.dealt:
            self.qkv = _projection(whole.qkv, [query, kv, kv], self.head_width, tensor)
        else:
            first, *others = self._whole_rows
            self.qkv = JoinedLinear(
                _projection(_like(whole.qkv, first), [query], self.head_width, tensor),
                _projection(_like(whole.qkv, sum(others)), [kv, kv], self.head_width, tensor),
            )
        _share_outputs(self, query, kv, tensor)

    def canonical_parts(self) -> dict[str, list[tuple[str, int]]]:
        query, key, value = zip(("q.weight", "k.weight", "v.weight"), self._whole_rows, strict=True)
        if isinstance(self.qkv, JoinedLinear):
            return {"qkv.first.weight": [query], "qkv.second.weight": [key, value]}
        return {"qkv.weight": [query, key, value]}


class TensorCrossAttention(_DealtTokens, CrossAttention):
    """Some heads of ``whole``; stands where it stood."""

    def __init__(self, whole: CrossAttention, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._tensor = tensor
        query, kv = deal_heads(whole.query_heads, whole.kv_heads, tensor.rank, tensor.size)
        self._whole_rows = kv.total * self.head_width
        self.q = _projection(whole.q, [query], self.head_width, tensor)
        self.kv = _projection(whole.kv, [kv, kv], self.head_width, tensor, of_memory=True)
        _share_outputs(self, query, kv, tensor)

    def canonical_parts(self) -> dict[str, list[tuple[str, int]]]:
        return {"kv.weight": [("k.weight", self._whole_rows), ("v.weight", self._whole_rows)]}


class TensorStackedAttention(_Dealt, StackedAttention):
    """Some heads of ``whole``, of all layers; stands where it stood.

    Sources ``of_tokens`` are the rows that this rank has of the encoder's; all other rows are whole.
    """

    def __init__(self, whole: StackedAttention, tensor: TensorRank, *, of_tokens: bool) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._tensor, self._of_tokens = tensor, of_tokens
        width = self.head_width
        query_heads, kv_heads = (linear.weight.shape[1] // width for linear in (whole.q, whole.k))
        query, kv = deal_heads(query_heads, kv_heads, tensor.rank, tensor.size)
        for name, side in (("q", query), ("k", kv), ("v", kv)):
            linear = getattr(whole, name)
            part = (
                StackedColumn(linear, side.rows(width))
                if side.dealt
                else StackedSharedHeads(linear, width, side.numbers)
            )
            setattr(self, name, part)
        held = max(query, kv, key=lambda side: side.total).rows(width)
        self.inner, self.out = len(held), StackedRow(whole.out, held, tensor)
        if whole.gate is not None:
            self.gate = StackedColumn(whole.gate, held)

    def _keys_and_values(self, sources: torch.Tensor, again: torch.Tensor | None) -> Sequence[torch.Tensor]:
        return self._map(sources, [self.k, self.v])  # ranks add up their gradient once

    def _map(self, rows: torch.Tensor, maps: Sequence[Any]) -> Sequence[torch.Tensor]:
        matrices = [one.matrix() for one in maps]
        if self._of_tokens and maps[0] is self.k:
            return self._tensor.products(rows, matrices, of_memory=True)
        rows = enter_parts(rows, self._tensor.ranks)
        return [torch.matmul(rows, matrix.mT) for matrix in matrices]


def _like(whole: nn.Linear, outputs: int) -> nn.Linear:
    """A map like ``whole`` with other outputs."""
    return nn.Linear(whole.in_features, outputs, bias=False, device=whole.weight.device)
