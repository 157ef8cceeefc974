"""How much more tensor-parallel ranks exchange when they divide the tokens, in rows of the model's width.

A sum over the ranks becomes a scattering and a gathering, which send as much together. More are: inputs of
products, of which each rank keeps its slice, gathered again for the gradients of weights; what is read of
memories and of the encoder, which is divided and gathered; results that are joined at the end. Less is sent
around the embedding, and around routed experts, to which each rank sends the tokens that it has. Small things
are left out as in :mod:`rxt_dist.train.tensor_traffic`.

Shape legend: N tokens of a micro-batch, L layers of the memory, S STM slots.
"""

from __future__ import annotations

from typing import NamedTuple

from rxt_dist.config import ModelConfig, RunConfig, StageConfig
from rxt_dist.config.run import stage_window
from rxt_dist.stages.base import uses


class _Rows(NamedTuple):
    """Rows that are gathered or scattered in addition; negative: fewer."""

    forward: int = 0
    backward: int = 0

    def plus(self, other: _Rows) -> _Rows:
        return _Rows(self.forward + other.forward, self.backward + other.backward)


def divided_rows(config: RunConfig, stage: StageConfig, tokens: int, units: int) -> int:
    """Rows of one micro-batch of ``tokens``, in packs or in ``units`` lanes, forward and backward."""
    model = config.model
    layers = model.decoder.num_layers
    if not stage.uses_lanes:
        found = _Rows()
        if uses(stage.components, "encoder"):
            masked = _Rows(backward=round(tokens * stage.masking_probability))
            found = found.plus(_encoder(model, tokens, trains=True)).plus(masked)
        if uses(stage.components, "decoder"):
            joint = stage.components == "joint"
            rows = layers * (tokens if joint else model.stm_size)
            found = found.plus(_decoder(model, tokens, trains=True, reads_gradient=True))
            found = found.plus(_memory(model, rows, trains=joint, writes=False))
        return sum(found)
    encoder, writer, decoder = (
        name not in stage.frozen for name in ("encoder", "memory_attention", "decoder")
    )
    if stage.name == "context_sft":
        found = _encoder(model, tokens, trains=True)
        found = found.plus(_decoder(model, tokens, trains=True, reads_gradient=True))
        return sum(found.plus(_memory(model, layers * tokens, trains=True, writes=True)))
    smat, window = stage.name == "smat", stage_window(config, stage)
    found = _encoder(model, tokens, trains=smat and encoder)
    found = found.plus(_writes(model, tokens, trains=writer, encoder=smat and encoder))
    if smat:
        writes = encoder or writer
        found = found.plus(_decoder(model, tokens, trains=decoder, reads_gradient=writes))
        slots = layers * model.stm_size * units * window
        found = found.plus(_memory(model, slots, trains=decoder, writes=writes))
    if config.runtime.recompute == "interaction":  # all positions but the last pass forward once more
        found = found.plus(_Rows(found.forward * (window - 1) // window))
    return sum(found)


def _encoder(model: ModelConfig, tokens: int, *, trains: bool) -> _Rows:
    layers = model.encoder.num_layers
    # The embedding's sum is not gathered, the output of every layer is.
    return _Rows(tokens * (layers - 1), tokens * (1 + 2 * layers) * trains)


def _decoder(model: ModelConfig, tokens: int, *, trains: bool, reads_gradient: bool) -> _Rows:
    """Of a decoder with the loss behind it. If it is frozen, gradients reach its tokens only where they have
    read the memory."""
    part = model.decoder
    kinds = [*part.stateless_layers, *part.final_stateless_layers]
    routed = kinds.count("moe") + (0 if part.moe is None else part.num_layers)
    # The embedding's sum is not gathered, the result is.
    forward = -routed
    if not trains:
        ahead = part.stateless_layers.count("moe")
        # The loss gathers its input again; so is the gradient of the first that the memory gives to tokens.
        return _Rows(tokens * forward, tokens * (2 - (routed - ahead)) * reads_gradient)
    halves = 2 * len(kinds) + 3 * part.num_layers
    shared = part.moe is not None and part.moe.num_shared_experts > 0
    products = halves if shared else halves - routed
    return _Rows(tokens * forward, tokens * (2 + products - routed))


def _memory(model: ModelConfig, rows: int, *, trains: bool, writes: bool) -> _Rows:
    """Of ``rows`` of all layers together, which are read by a decoder that ``trains``. ``writes``: whether
    they have a gradient."""
    summed = writes or (trains and model.decoder.stm_norm)
    return _Rows(rows, rows * (trains + writes - summed))


def _writes(model: ModelConfig, tokens: int, *, trains: bool, encoder: bool) -> _Rows:
    """Of the encoder's rows that memory attention reads; ``trains`` and ``encoder``: whether they train."""
    rows = model.decoder.num_layers * tokens
    return _Rows(rows, rows * (trains + encoder - 1) if trains or encoder else 0)
