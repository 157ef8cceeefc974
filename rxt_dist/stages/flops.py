"""Floating-point operations of a training step, from its shapes alone.

Counted are matrix products, as the mathematics needs them: two operations for every pair of factors, scores
only of a query and a key that it sees, experts that a token visits, heads at rows with a target, and in the
backward pass only gradients that somebody asks for (among them those of heads, which the forward pass
computes with their loss). Padding, recomputation and everything elementwise are not counted, so that the
share of a device's rate that this makes is the same for every way to compute it.

Shape legend: N tokens, D embedding width, L layers, b lanes, S STM slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rxt_dist.config import AttentionConfig, ModelConfig, RunConfig, StageConfig
from rxt_dist.config.model import INTERLAYER_VARIANTS
from rxt_dist.data.batch import TextBatch
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.model.layout import SequenceLayout

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Flops:
    """Operations of the two passes."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


def batch_flops(
    config: RunConfig, stage: StageConfig, batch: TextBatch | WindowBatch, trains: Callable[[str], bool]
) -> Flops:
    """Operations of one micro-batch, whose layouts must be on the host.

    ``trains`` says of a component whether its parameters are updated (:meth:`StageModule.trains`).
    """
    counter = _Counter(config.model)
    if isinstance(batch, TextBatch):
        _count_text(counter, stage, batch)
    elif stage.name == "smat":
        _count_smat(counter, batch, trains)
    elif stage.name == "context_sft":
        _count_context(counter, batch)
    else:
        _count_memory_attention(counter, stage, batch)
    return Flops(counter.forward, counter.backward)


def _lengths(layout: SequenceLayout) -> Lengths:
    found: Lengths = layout.cu_seqlens.diff().numpy().astype(np.int64)
    return found


def _causal_pairs(lengths: Lengths, most: int | None = None) -> int:
    """Pairs of a position t of every sequence and the keys 0 to t, of which there are ``most``."""
    seen = lengths if most is None else np.minimum(lengths, most)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def _count_text(counter: _Counter, stage: StageConfig, batch: TextBatch) -> None:
    lengths = _lengths(batch.layout)
    tokens, square = int(lengths.sum()), int((lengths**2).sum())
    model = counter.model
    if stage.components != "decoder":
        hidden = counter.encoder(tokens, square, trained=True)
        features = counter.product(batch.masked_index.numel(), model.embed_dim, model.embed_dim, hidden, True)
        counter.head(batch.masked_index.numel(), features, trained=True)
        # The decoder reads the detached layers of the encoder.
        pairs = _causal_pairs(lengths) if model.decoder.causal_cross else square
        memory = _MemoryRows(tokens, pairs, wants_gradient=False, trained=True)
    else:
        slots = model.stm_size
        pairs = _causal_pairs(lengths, slots) if model.decoder.causal_cross else tokens * slots
        memory = _MemoryRows(slots, pairs, wants_gradient=False, trained=False)
    if stage.components != "encoder":
        hidden = counter.decoder(lengths, memory, trained=True)
        counter.head(batch.next_index.numel(), hidden, trained=True)


def _count_smat(counter: _Counter, batch: WindowBatch, trains: Callable[[str], bool]) -> None:
    model, slots = counter.model, counter.model.stm_size
    stm = False
    for before, at in zip(batch.look_backs, batch.positions, strict=True):
        written = _lengths(before.layout)
        with counter.gradients(trains("encoder")):
            encoded = counter.encoder(int(written.sum()), int((written**2).sum()), trained=trains("encoder"))
        with counter.gradients(trains("encoder") or trains("memory_attention")):
            stm = counter.write(written, stm, encoded, trained=trains("memory_attention"))
        lengths = _lengths(at.layout)
        pairs = int(lengths.sum()) * slots
        if model.decoder.causal_cross:
            pairs = _causal_pairs(lengths, slots)
        rows = _MemoryRows(len(lengths) * slots, pairs, wants_gradient=stm, trained=trains("decoder"))
        hidden = counter.decoder(lengths, rows, trained=trains("decoder"))
        counter.head(at.next_index.numel(), hidden, trained=trains("decoder"))


def _count_context(counter: _Counter, batch: WindowBatch) -> None:
    seen = np.zeros(len(batch.lanes), dtype=np.int64)  # rows that each lane has to read
    pairs = 0
    for before, at in zip(batch.look_backs, batch.positions, strict=True):
        read = np.where(before.present.numpy(), _lengths(before.layout), 0)
        seen = np.where(at.reset.numpy(), 0, seen) + read
        pairs += int((_lengths(at.layout) * seen).sum())
    written, lengths = (
        np.concatenate([_lengths(at.layout) for at in interactions])
        for interactions in (batch.look_backs, batch.positions)
    )
    counter.encoder(int(written.sum()), int((written**2).sum()), trained=True)
    rows = _MemoryRows(int(written.sum()), pairs, wants_gradient=True, trained=True)
    hidden = counter.decoder(lengths, rows, trained=True)
    counter.head(sum(at.next_index.numel() for at in batch.positions), hidden, trained=True)


def _count_memory_attention(counter: _Counter, stage: StageConfig, batch: WindowBatch) -> None:
    stm = False
    for at in batch.positions:
        with counter.gradients(False):
            counter.encoder(*_encoded_rows(counter.model, stage, at), trained=False)
        stm = counter.write(_lengths(at.layout), stm, False, trained=True)


def _encoded_rows(model: ModelConfig, stage: StageConfig, at: LaneInteractions) -> tuple[int, int]:
    """Rows that the encoder of the memory-attention stage has, and pairs of them that attend."""
    lengths = _lengths(at.layout)
    if stage.unused_slots != "reference":
        return int(lengths.sum()), int((lengths**2).sum())
    width = max(model.stm_size, int(lengths.max()))  # padding reads real tokens and is read by none
    return len(lengths) * width, width * int(lengths.sum())


@dataclass(frozen=True)
class _MemoryRows:
    """What the decoder's cross-attention reads in each layer."""

    rows: int
    pairs: int
    wants_gradient: bool
    trained: bool
    """Whether the parameters of the cross-attention are."""


class _Counter:
    """Sums; every method returns whether its result has a gradient, and takes the same of its inputs."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.forward = self.backward = 0
        self._enabled = True

    @contextmanager
    def gradients(self, enabled: bool) -> Iterator[None]:
        """Inside, results have a gradient only if ``enabled``."""
        before, self._enabled = self._enabled, enabled
        yield
        self._enabled = before

    def product(self, rows: int, fan_in: int, fan_out: int, x: bool, weight: bool) -> bool:
        """``rows`` vectors through a matrix; ``x`` and ``weight``: which of them want a gradient."""
        operations = 2 * rows * fan_in * fan_out
        self.forward += operations
        if self._enabled:
            self.backward += operations * (x + weight)
        return self._enabled and (x or weight)

    def scores(self, pairs: int, heads: int, width: int, queries: bool, rows: bool) -> bool:
        """Softmax attention of ``pairs``; ``rows``: whether keys and values want a gradient."""
        operations = 2 * pairs * heads * width
        self.forward += 2 * operations
        if self._enabled:
            # Of the values, of the probabilities, of queries and keys.
            self.backward += operations * (rows + (queries or rows) + queries + rows)
        return self._enabled and (queries or rows)

    def feed_forward(self, rows: int, hidden: int, *, gated: bool, x: bool, trained: bool) -> bool:
        width = self.model.embed_dim
        inner = self.product(rows, width, 2 * hidden if gated else hidden, x, trained)
        return self.product(rows, hidden, width, inner, trained)

    def attention(
        self,
        part: AttentionConfig,
        head_width: int,
        rows: tuple[int, int],
        pairs: int,
        *,
        inputs: tuple[bool, bool],
        trained: bool,
    ) -> bool:
        """``rows`` of queries and of keys, and whether the ``inputs`` of both want a gradient."""
        width, heads = self.model.embed_dim, max(part.query_heads, part.kv_heads)
        queries = self.product(rows[0], width, part.query_heads * head_width, inputs[0], trained)
        keys = self.product(rows[1], width, 2 * part.kv_heads * head_width, inputs[1], trained)
        joined = self.scores(pairs, heads, head_width, queries, keys)
        if part.gated:
            joined |= self.product(rows[0], width, heads * head_width, inputs[0], trained)
        return self.product(rows[0], heads * head_width, width, joined, trained)

    def encoder(self, tokens: int, pairs: int, *, trained: bool) -> bool:
        part = self.model.encoder
        x = trained
        for _ in range(part.num_layers):
            head_width = self.model.embed_dim // part.heads
            rows, inputs = (tokens, tokens), (x, x)
            x |= self.attention(part.attention, head_width, rows, pairs, inputs=inputs, trained=trained)
            x |= self.feed_forward(tokens, part.ff_dim, gated=part.gated_ff, x=x, trained=trained)
        return self._enabled and x

    def decoder(self, lengths: Lengths, memory: _MemoryRows, *, trained: bool) -> bool:
        part = self.model.decoder
        tokens, pairs = int(lengths.sum()), _causal_pairs(lengths)
        head_width = self.model.embed_dim // part.heads
        layers = [(kind, False) for kind in part.stateless_layers]
        layers += [("dense" if part.moe is None else "moe", True)] * part.num_layers
        layers += [(kind, False) for kind in part.final_stateless_layers]
        x = trained
        for kind, reads in layers:
            rows, inputs = (tokens, tokens), (x, x)
            x |= self.attention(part.attention, head_width, rows, pairs, inputs=inputs, trained=trained)
            if reads:
                # A trained norm gives its output a gradient, whatever it reads.
                normed = memory.wants_gradient or (part.stm_norm and memory.trained)
                x |= self.attention(
                    part.cross_attention,
                    head_width,
                    (tokens, memory.rows),
                    memory.pairs,
                    inputs=(x, normed),
                    trained=memory.trained,
                )
            if kind == "moe":
                x |= self._experts(tokens, x=x, trained=trained)
            else:
                hidden = part.ff_dim if reads else part.dense_layer_dim
                x |= self.feed_forward(tokens, hidden, gated=part.gated_ff, x=x, trained=trained)
        return x

    def head(self, rows: int, x: bool, *, trained: bool) -> None:
        """Logits of ``rows`` with a target."""
        vocabulary = self.model.vocab_size
        assert isinstance(vocabulary, int)
        self.product(rows, self.model.embed_dim, vocabulary, x, trained)

    def write(self, lengths: Lengths, stm: bool, encoded: bool, *, trained: bool) -> bool:
        """The memory attention of interactions of ``lengths`` [b]."""
        part, model = self.model.memory_attention, self.model
        slots, tokens = len(lengths) * model.stm_size, int(lengths.sum())
        within = slots * model.stm_size
        normed = stm or trained
        old = stm
        if part.variant == "self":
            heads = part.self_attention or part.attention
            update = self._stacked(heads, (slots, slots), within, (normed, normed), trained)
            old = self._mix(part.gate_self_attention, slots, stm, update, trained)
        elif part.variant in INTERLAYER_VARIANTS:
            source = normed
            if part.variant != "interlayer":
                source = self._mix(True, slots, normed, normed, trained)
            heads = part.interlayer_attention or part.attention
            update = self._stacked(heads, (slots, slots), within, (normed, source), trained)
            old = self._mix(True, slots, stm, update, trained)
        sources = encoded or (part.input_norm and trained)
        pairs = tokens * model.stm_size
        update = self._stacked(part.attention, (slots, tokens), pairs, (old or trained, sources), trained)
        return self._mix(part.gate_residual, slots, old, update, trained) if part.residual else update

    def _experts(self, tokens: int, *, x: bool, trained: bool) -> bool:
        part, moe = self.model.decoder, self.model.decoder.moe
        assert moe is not None
        width, gated = self.model.embed_dim, part.gated_ff
        routed = self.product(tokens, width, moe.num_experts, x, trained)
        rows = tokens * moe.top_k
        routed |= self.feed_forward(rows, part.ff_dim, gated=gated, x=x, trained=trained)
        if moe.num_shared_experts:
            hidden = moe.shared_expert_dim or part.ff_dim
            rows = tokens * moe.num_shared_experts
            routed |= self.feed_forward(rows, hidden, gated=gated, x=x, trained=trained)
        if moe.num_shared_experts > 1:
            shares = self.product(tokens, width, moe.num_shared_experts, x, trained)
            if moe.shared_bias == "local":
                self.product(tokens, moe.num_shared_experts, width, shares, trained)
        return routed

    def _stacked(
        self,
        part: AttentionConfig,
        rows: tuple[int, int],
        pairs: int,
        inputs: tuple[bool, bool],
        trained: bool,
    ) -> bool:
        """Attention of STM slots; ``rows`` and ``pairs`` are those of a layer."""
        layers = self.model.decoder.num_layers
        head_width = self.model.embed_dim // self.model.memory_attention.heads
        counts = (layers * rows[0], layers * rows[1])
        return self.attention(part, head_width, counts, layers * pairs, inputs=inputs, trained=trained)

    def _mix(self, gated: bool, slots: int, old: bool, new: bool, trained: bool) -> bool:
        """The gate that mixes an update into ``slots`` slots of every layer."""
        gate, model = self.model.memory_attention.gate, self.model
        status = old or new
        if not gated or gate.type == "off":
            return status
        layers, size = model.decoder.num_layers, model.stm_size
        if gate.type == "linear":
            if gate.slot_status == "linear":
                status = self.product(layers * slots, model.embed_dim, 1, status, trained)
            outputs = size if gate.per_slot else 1
            self.product(layers * slots // size, size, outputs, status, trained)
        return self._enabled and (old or new or trained)
