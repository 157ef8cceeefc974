"""How much tensor-parallel ranks exchange, counted in rows of the model's width.

Left out is what is small beside rows: four numbers a token for each loss, routing weights, gradients of
copied norms and heads.

Shape legend: N tokens of a micro-batch, L layers of the memory, S STM slots.
"""

from __future__ import annotations

from typing import NamedTuple

from rxt_dist.config import ModelConfig, RunConfig, StageConfig
from rxt_dist.stages.base import uses


class TensorRows(NamedTuple):
    """Rows that the ranks of a group add up, and rows whose slices they join."""

    summed: int = 0
    joined: int = 0

    def plus(self, *others: TensorRows) -> TensorRows:
        return TensorRows(*(sum(column) for column in zip(self, *others, strict=True)))

    def times(self, count: int) -> TensorRows:
        return TensorRows(*(count * rows for rows in self))


def tensor_rows(config: RunConfig, stage: StageConfig, tokens: int, units: int) -> TensorRows:
    """Rows of one micro-batch of ``tokens``, in packs or in ``units`` lanes, forward and backward."""
    model = config.model
    if not stage.uses_lanes:
        found = TensorRows()
        if uses(stage.components, "encoder"):
            masked = round(tokens * stage.masking_probability)
            found = found.plus(_encoder(model, trains=True).times(tokens), TensorRows(masked))
        if uses(stage.components, "decoder"):
            # What is read has no gradient, but its norm has; a decoder alone keeps both as they are.
            reads = stage.components == "joint" and model.decoder.stm_norm
            memory = tokens * model.decoder.num_layers if reads else 0
            found = found.plus(_decoder(model, trains=True).times(tokens), TensorRows(tokens + memory))
        return found
    smat, lanes = stage.name == "smat", units * config.batch.window
    trains_encoder = smat and "encoder" not in stage.frozen
    writes = trains_encoder or "memory_attention" not in stage.frozen
    found = _encoder(model, trains=trains_encoder).times(tokens)
    found = found.plus(_writes(model, tokens, lanes, trains=writes))
    if smat:
        trains = "decoder" not in stage.frozen
        slots = model.decoder.num_layers * model.stm_size * lanes
        memory = slots if writes or (trains and model.decoder.stm_norm) else 0
        decoder = _decoder(model, trains=trains, reads_gradient=writes)
        found = found.plus(decoder.times(tokens), TensorRows(tokens * (trains or writes) + memory))
    return found


def _encoder(model: ModelConfig, *, trains: bool) -> TensorRows:
    """Rows a token: its embedding, and each half of a layer at its end and in the backward pass at its
    beginning."""
    return TensorRows(1 + (2 + 2 * trains) * model.encoder.num_layers)


def _decoder(model: ModelConfig, *, trains: bool, reads_gradient: bool = True) -> TensorRows:
    """Rows a token. If it is frozen, gradients reach its tokens only where they have read the memory."""
    part = model.decoder
    attention = dense = (TensorRows(1), TensorRows(1))  # forward, backward
    moe = (TensorRows(0, 1), TensorRows(0, 1))
    if part.moe is not None and part.moe.num_shared_experts:
        moe = (TensorRows(1, 1), TensorRows(1, 1))
    before, after = (
        [half for kind in kinds for half in (attention, moe if kind == "moe" else dense)]
        for kinds in (part.stateless_layers, part.final_stateless_layers)
    )
    layers = [attention, attention, dense if part.moe is None else moe] * part.num_layers
    halves = [*before, *layers, *after]
    reached = len(before) + 2 if not trains else 0
    backward = halves[reached:] if trains or reads_gradient else []
    return TensorRows(1).plus(*(forward for forward, _ in halves), *(back for _, back in backward))


def _writes(model: ModelConfig, tokens: int, lanes: int, *, trains: bool) -> TensorRows:
    """Rows of memory attention for ``lanes`` interactions of ``tokens`` together."""
    part, layers = model.memory_attention, model.decoder.num_layers
    slots = layers * model.stm_size * lanes
    attentions = 1 if part.variant == "simple" else 2
    rows = attentions * slots
    if trains:
        rows += attentions * slots + layers * tokens
        if part.variant != "simple":
            rows += slots // layers if part.variant == "interlayer" else slots
    return TensorRows(rows)
