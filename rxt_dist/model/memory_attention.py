"""Memory attention: the network that writes an encoded interaction into the short-term memory (STM).

Every layer reads the STM from before the write, so the layers do not wait for each other: parameters of
all of them are stacked in one tensor, and every step is one batched call.

Shape legend: L layers, B lanes (one sequence each), S STM slots, N tokens of all lanes, D embedding width,
R rows of a layer, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rxt_dist.config import AttentionConfig, GateConfig, ModelConfig
from rxt_dist.config.model import INTERLAYER_VARIANTS
from rxt_dist.kernels.attention import AttentionLayout, attention
from rxt_dist.kernels.compilation import compiled
from rxt_dist.model.initialisation import Distribution, Normal
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.memory_gate import MemoryGate, mix
from rxt_dist.model.memory_mix import mixed_and_normed, mixed_into
from rxt_dist.model.memory_norm import MixedNorm, make_memory_norm, normed
from rxt_dist.model.memory_sources import has_kernels, normed_and_mixed
from rxt_dist.model.rope import RopeSettings, Rotation
from rxt_dist.model.stacked import Stacked, StackedLinear, StackedRMSNorm

GateValues = dict[str, torch.Tensor]
"""Gate values by the gate's name, each broadcastable to [L, B, S, 1], without gradient."""


@dataclass(frozen=True, eq=False)
class MemoryGroups:
    """Attention groups of the L * B pairs of layer and lane, layers outermost.

    Attributes:
        tokens: slots of a lane to the tokens of its sequence; slots: slots of a lane to one another.
    """

    tokens: AttentionLayout
    slots: AttentionLayout

    @classmethod
    def of(cls, layout: SequenceLayout, layers: int, slots: int) -> MemoryGroups:
        """The groups over ``layout``, built on first use and kept with it, without a host sync."""
        key = f"_memory_groups_{layers}_{slots}"
        found: MemoryGroups | None = vars(layout).get(key)
        if found is None:
            found = vars(layout)[key] = cls._build(layout, layers, slots)
        return found

    @classmethod
    def _build(cls, layout: SequenceLayout, layers: int, slots: int) -> MemoryGroups:
        one = layout.self_attention  # keys that a sequence hides from itself are hidden from the STM too
        device = one.cu_k.device
        numbers = torch.arange(layers, device=device)[:, None]
        index = one.key_index
        keys = layout.num_tokens if index is None else index.shape[0]
        starts = (one.cu_k[:-1] + numbers * keys).flatten()
        cu_k = torch.cat((starts, torch.full((1,), layers * keys, device=device))).to(torch.int32)
        if index is not None:
            index = (index + numbers * layout.num_tokens).flatten()
        groups = layers * layout.num_sequences
        cu_q = torch.arange(groups + 1, dtype=torch.int32, device=device) * slots
        return cls(
            tokens=AttentionLayout(cu_q, cu_k, slots, one.max_k, index),
            slots=AttentionLayout(cu_q, cu_q, slots, slots),
        )


class StackedAttention(Stacked):
    """Attention of STM slots to rows of their own layer and lane.

    Args of forward:
        queries: [L, R, D]; sources: [L, R', D], or [1, R', D] to be read by every layer; layout: groups of
        the L * R query rows and L * R' key rows; rotation: angles of the R' source rows, None without RoPE
        (queries are never rotated: a slot has no position).

    Returns [L, R, D] in the dtype of the weights.
    """

    def __init__(self, layers: int, width: int, head_width: int, config: AttentionConfig) -> None:
        super().__init__()
        query, kv = config.query_heads * head_width, config.kv_heads * head_width
        self.head_width, self.inner = head_width, max(query, kv)
        self.q = StackedLinear(layers, width, query, bias=False)
        self.k = StackedLinear(layers, width, kv, bias=False)
        self.v = StackedLinear(layers, width, kv, bias=False)
        self.out = StackedLinear(layers, self.inner, width, bias=config.output_bias)
        self.gate = StackedLinear(layers, width, self.inner, bias=False) if config.gated else None
        self.query_norm = StackedRMSNorm(layers, head_width) if config.qk_norm else None
        self.key_norm = StackedRMSNorm(layers, head_width) if config.qk_norm else None

    def initial_distributions(self) -> dict[str, Distribution]:
        return {} if self.gate is None else {"gate.weight": Normal(mean=1.0, std=0.01)}

    def forward(
        self,
        queries: torch.Tensor,
        sources: torch.Tensor,
        layout: AttentionLayout,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        projected: torch.Tensor = self.out(self._joined(queries, sources, layout, rotation))
        return projected

    def product(
        self,
        queries: torch.Tensor,
        sources: torch.Tensor,
        layout: AttentionLayout,
        rotation: Rotation | None = None,
        again: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result before its bias is added. ``again``: ``sources`` once more, in the dtype of the weights,
        where the gradients of the two are wanted apart."""
        return self.out.product(self._joined(queries, sources, layout, rotation, again))

    def _joined(
        self,
        queries: torch.Tensor,
        sources: torch.Tensor,
        layout: AttentionLayout,
        rotation: Rotation | None,
        again: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries, sources = queries.to(self.dtype), sources.to(self.dtype)
        q, *gate = self._map(queries, [self.q] if self.gate is None else [self.q, self.gate])
        q, k, v = (self._heads(rows) for rows in (q, *self._keys_and_values(sources, again)))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            k = rotation.apply_one_sided(k)
        heads = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, causal=False)
        joined = heads.flatten(-2).view(*queries.shape[:2], self.inner)
        if gate:
            joined = joined * torch.sigmoid(gate[0])
        return joined

    def _keys_and_values(self, sources: torch.Tensor, again: torch.Tensor | None) -> Sequence[torch.Tensor]:
        if again is None:
            return self._map(sources, [self.k, self.v])
        return [*self._map(sources, [self.k]), *self._map(again, [self.v])]

    def _map(self, rows: torch.Tensor, maps: Sequence[StackedLinear]) -> Sequence[torch.Tensor]:
        """``rows`` [L, R, D] or [1, R, D] through each of ``maps``."""
        return [one(rows) for one in maps]

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(*rows.shape[:-1], rows.shape[-1] // self.head_width, self.head_width)


class MemoryAttention(nn.Module):
    """STM before an interaction and its encoding -> STM after it.

    Each layer's slots attend to that layer's encoded tokens, and a gate mixes the result into them. What
    the slots read first depends on the variant: nothing (simple), their own layer (self), the mean over
    layers (interlayer), a gated mixture of both (self_interlayer), or the same with the mean of a group of
    layers (grouped_self_interlayer).

    Args of forward:
        stm: [L, B, S, D], the dtype in which the memory accumulates (projections run in the weights' dtype).
            S is free in networks without a parameter for each slot; see :attr:`fixed_slots`.
        encoded: [L, N, D], the encoder's residual stream after each layer.
        layout: the B sequences of the N tokens; sequence b is the interaction of lane b.
        present: bool [B], lanes that have an interaction; None for all. The others keep their memory, and
            nothing of them (their encoding may be anything, NaN included) reaches a value or gradient.
        gates: filled with the gate values where given; see :func:`gate_statistics`.

    Returns [L, B, S, D] in the dtype of ``stm``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        part = config.memory_attention
        layers, slots, width = config.decoder.num_layers, config.stm_size, config.embed_dim
        self.layers, self.slots, self.width, self.groups = layers, slots, width, part.num_groups
        gates_per_slot = part.gate.type == "linear" or (part.gate.type != "off" and part.gate.per_slot)
        self.fixed_slots = gates_per_slot or part.norm == "positional"
        self.variant, self.residual = part.variant, part.residual
        self.head_width, self.rope = width // part.heads, RopeSettings.of(config)

        def norm(count: int = layers) -> StackedRMSNorm | MixedNorm:
            return make_memory_norm(part, count, slots, width)

        def attends(heads: AttentionConfig | None = None) -> StackedAttention:
            return StackedAttention(layers, width, self.head_width, heads or part.attention)

        def gate(gated: bool = True) -> MemoryGate | None:
            chosen: GateConfig = part.gate
            return MemoryGate(chosen, layers, slots, width) if gated and chosen.type != "off" else None

        self.norm = norm()
        self.input_norm = StackedRMSNorm(layers, width) if part.input_norm else None
        self.attention, self.gate = attends(), gate(part.gate_residual)
        if self.variant == "self":
            self.self_norm, self.self_attention = norm(), attends(part.self_attention)
            self.self_gate = gate(part.gate_self_attention)
        elif self.variant in INTERLAYER_VARIANTS:
            self.mean_norm, self.interlayer_norm = norm(1), norm()
            self.interlayer_attention = attends(part.interlayer_attention)
            self.interlayer_gate = gate()
            self.source_gate = gate(self.variant != "interlayer")

    def reset_statistics(self) -> None:
        """Start the running means of the norms anew."""
        for module in self.modules():
            if isinstance(module, MixedNorm):
                module.reset_statistics()

    def forward(
        self,
        stm: torch.Tensor,
        encoded: torch.Tensor,
        layout: SequenceLayout,
        present: torch.Tensor | None = None,
        gates: GateValues | None = None,
    ) -> torch.Tensor:
        self._check(stm, encoded, layout)
        groups = MemoryGroups.of(layout, self.layers, stm.shape[2])
        dtype = self.attention.dtype
        rotation = self.rope.rotation(layout.positions, self.head_width, dtype)
        return self._write(stm, encoded, layout.sequence_ids, groups, rotation, present, gates)

    @compiled
    def _write(
        self,
        stm: torch.Tensor,
        encoded: torch.Tensor,
        sequence_ids: torch.Tensor,
        groups: MemoryGroups,
        rotation: Rotation,
        present: torch.Tensor | None,
        gates: GateValues | None,
    ) -> torch.Tensor:
        before = stm
        if present is not None:
            # Masked at the entrance, so that the backward pass multiplies no zero by a NaN.
            absent = ~present
            stm = stm.masked_fill(absent[:, None, None], 0.0)
            encoded = encoded.masked_fill(absent[sequence_ids][:, None], 0.0)
        sources = self._sources(encoded)
        if self._has_kernels(before):
            return self._write_by_kernels(before, sources, groups, rotation, present, gates)
        old = self._read_memory(stm, groups.slots, present, gates)
        queries = normed(self.norm, old, present).flatten(1, 2)
        update = self.attention(queries, sources, groups.tokens, rotation).view(stm.shape)
        after = self._mix("gate", old, update, gates) if self.residual else update
        after = after.to(stm.dtype)
        return after if present is None else torch.where(present[:, None, None], after, before)

    def _has_kernels(self, stm: torch.Tensor) -> bool:
        if self.variant not in ("self_interlayer", "grouped_self_interlayer"):
            return False
        norms = (self.norm, self.interlayer_norm, self.mean_norm)
        return has_kernels(stm, norms, (self.gate, self.interlayer_gate, self.source_gate))

    def _write_by_kernels(
        self,
        stm: torch.Tensor,
        sources: torch.Tensor,
        groups: MemoryGroups,
        rotation: Rotation,
        present: torch.Tensor | None,
        gates: GateValues | None,
    ) -> torch.Tensor:
        """What :meth:`_write` computes, of ``stm`` as it is given; absent lanes may hold anything."""
        one, all_layers = self.attention, self.interlayer_attention
        assert self.source_gate is not None
        assert self.interlayer_gate is not None
        assert self.gate is not None
        norms = self.interlayer_norm, self.mean_norm
        read = normed_and_mixed(stm, *norms, self.source_gate, self.groups, present, one.dtype)
        update = all_layers.product(read.normed, read.mixed, groups.slots, again=read.again)
        old, queries, sums, interlayer = mixed_and_normed(
            stm, update, all_layers.out.bias, self.interlayer_gate, read.sums, self.norm, present
        )
        update = one.product(queries, sources, groups.tokens, rotation)
        after, value = mixed_into(stm, old, update, one.out.bias, self.gate, sums, present)
        if gates is not None:
            found = {"source_gate": read.gate, "interlayer_gate": interlayer, "gate": value}
            gates.update((name, values.detach()) for name, values in found.items())
        return after

    def _sources(self, encoded: torch.Tensor) -> torch.Tensor:
        """What the slots read of ``encoded`` [L, N, D]."""
        return encoded if self.input_norm is None else self.input_norm(encoded)

    def _read_memory(
        self,
        stm: torch.Tensor,
        groups: AttentionLayout,
        present: torch.Tensor | None,
        gates: GateValues | None,
    ) -> torch.Tensor:
        """The step before the encoding is read: what the variant lets the slots read of the STM."""
        if self.variant == "simple":
            return stm
        if self.variant == "self":
            rows = normed(self.self_norm, stm, present).flatten(1, 2)
            return self._mix("self_gate", stm, self.self_attention(rows, rows, groups).view(stm.shape), gates)
        queries = normed(self.interlayer_norm, stm, present)
        source = stm.reshape(self.groups, self.layers // self.groups, *stm.shape[1:]).mean(dim=1)
        source = normed(self.mean_norm, source, present)
        if self.groups > 1:
            source = source.repeat_interleave(self.layers // self.groups, dim=0)
        if self.variant != "interlayer":
            source = self._mix("source_gate", queries, source, gates)
        update = self.interlayer_attention(queries.flatten(1, 2), source.flatten(1, 2), groups)
        return self._mix("interlayer_gate", stm, update.view(stm.shape), gates)

    def _mix(self, name: str, old: torch.Tensor, new: torch.Tensor, gates: GateValues | None) -> torch.Tensor:
        mixture, value = mix(getattr(self, name), old, new)
        if gates is not None and value is not None:
            gates[name] = value.detach()
        return mixture

    def _check(self, stm: torch.Tensor, encoded: torch.Tensor, layout: SequenceLayout) -> None:
        slots = self.slots if self.fixed_slots or stm.dim() != 4 else stm.shape[2]
        expected = (self.layers, layout.num_sequences, slots, self.width)
        if tuple(stm.shape) != expected:
            raise ValueError(f"stm: found shape {tuple(stm.shape)}; expected {expected}")
        if tuple(encoded.shape) != (self.layers, layout.num_tokens, self.width):
            wanted = (self.layers, layout.num_tokens, self.width)
            raise ValueError(f"encoded: found shape {tuple(encoded.shape)}; expected {wanted}")


def gate_statistics(gates: GateValues, present: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of every gate's values over layers, present lanes and slots.

    Args:
        gates: what a forward pass of :class:`MemoryAttention` filled; present: bool [B] or None for all.

    Returns:
        ``<gate>_mean`` and ``<gate>_std`` -> fp32 scalar on the gates' device; 0 if no lane is present.
    """
    statistics = {}
    for name, value in gates.items():
        value = value.float()
        weight = torch.ones_like(value)
        if present is not None:
            value = value.expand(-1, present.shape[0], -1, -1)
            weight = present.to(value.dtype)[:, None, None].expand_as(value)
        count = weight.sum().clamp_min(1.0)
        mean = (value * weight).sum() / count
        variance = ((value - mean).square() * weight).sum() / count
        statistics[f"{name}_mean"] = mean
        statistics[f"{name}_std"] = variance.sqrt()
    return statistics
