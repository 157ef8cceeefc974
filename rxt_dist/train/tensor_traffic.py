"""How much tensor-parallel ranks exchange, counted in rows of the model's width.

Left out is what is small beside rows: four numbers a token for each loss, routing weights, gradients of
copied norms and heads.

Shape legend: N tokens of a micro-batch, L layers of the memory, S STM slots.
"""

from __future__ import annotations

from typing import NamedTuple

from rxt_dist.config import ModelConfig, RunConfig, StageConfig
from rxt_dist.config.run import stage_window
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
    if stage.name == "context_sft":
        return _context(model, tokens)
    trains = _Trains(writes=True)
    if stage.name == "smat":
        encoder = "encoder" not in stage.frozen
        writes = encoder or "memory_attention" not in stage.frozen
        trains = _Trains(encoder, writes, "decoder" not in stage.frozen)
    window = stage_window(config, stage)
    found = _lanes(model, stage, tokens, units * window, trains)
    if config.runtime.recompute == "interaction":  # all positions but the last pass forward once more
        again = _lanes(model, stage, tokens // window, units, _Trains())
        found = found.plus(again.times(window - 1))
    return found


class _Trains(NamedTuple):
    """What has a backward pass."""

    encoder: bool = False
    writes: bool = False
    decoder: bool = False


def _lanes(model: ModelConfig, stage: StageConfig, tokens: int, lanes: int, trains: _Trains) -> TensorRows:
    """Rows of ``lanes`` interactions of ``tokens`` together: encoded, written, and in stage smat answered."""
    found = _encoder(model, trains=trains.encoder).times(tokens)
    found = found.plus(_writes(model, tokens, lanes, trains=trains.writes))
    if stage.name == "smat":
        slots = model.decoder.num_layers * model.stm_size * lanes
        memory = slots if trains.writes or (trains.decoder and model.decoder.stm_norm) else 0
        decoder = _decoder(model, trains=trains.decoder, reads_gradient=trains.writes)
        reached = trains.decoder or trains.writes
        found = found.plus(decoder.times(tokens), TensorRows(tokens * reached + memory))
    return found


def _context(model: ModelConfig, tokens: int) -> TensorRows:
    """Rows of a window, of which every layer of the decoder takes in all encodings once."""
    read = model.decoder.num_layers * tokens
    found = _encoder(model, trains=True).plus(_decoder(model, trains=True)).times(tokens)
    return found.plus(TensorRows(tokens + read))


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
