"""Supervised memory-aware training: answer while reading a memory that the model itself wrote.

At every position of a window the interaction before it is encoded and written into the lane's STM, and the
decoder answers the interaction at that position while reading the STM. A lane carries the detached STM
from *before* its last write, so that the write is repeated inside the next window's graph: carrying its
result would leave encoder and memory attention without a gradient when a window has one interaction.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width, N tokens.
"""

from __future__ import annotations

import torch

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.config.stage import COMPONENTS
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch, side_by_side
from rxt_dist.kernels.compilation import recording
from rxt_dist.kernels.permute import take_rows
from rxt_dist.model import DecoderOutput, Memory, RxTModel
from rxt_dist.stages.base import NEVER, Term, router_weights
from rxt_dist.stages.lane_stage import LaneStageModule, Positions, Sums, add_sums


class SmatModule(LaneStageModule):
    """Stage ``smat``: encoder, memory attention and decoder, each from the step that the stage says."""

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__(model, config)
        self.decoder = model.decoder
        self.system_prompts = stage.system_prompts
        for name in COMPONENTS:
            self.starts[name] = NEVER if name in stage.frozen else stage.unfreeze.steps().get(name, 0)
        self.weights = {"answer_loss": 1.0, "answer_accuracy": 0.0, **router_weights(config, 1.0)}

    def encode(self, at: LaneInteractions) -> torch.Tensor:
        """The encoder's layers [L, N, D] of the interactions ``at``."""
        with recording(torch.is_grad_enabled() and self.trains("encoder"), training=self.training):
            layers: torch.Tensor = self.encoder(at.tokens, at.layout)
        return layers

    def write(
        self, stm: torch.Tensor, layers: torch.Tensor, at: LaneInteractions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The STM after ``layers`` [L, N, D] of the interactions ``at`` were written, and the gate sums."""
        trains = self.trains("encoder") or self.trains("memory_attention")
        with recording(torch.is_grad_enabled() and trains, training=self.training):
            return self.write_encoded(stm, layers, at)

    def decode(self, stm: torch.Tensor, at: LaneInteractions) -> DecoderOutput:
        """The decoder's output for interaction ``at`` read with ``stm`` [L, b, S, D]."""
        memory = Memory.of_stm(stm.to(self.weight_dtype), at.layout)
        output: DecoderOutput = self.call("decoder", at.tokens, at.layout, memory)
        return output

    def advance(
        self, stm: torch.Tensor, look_backs: Positions, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Write each look-back, then answer: sums of loss, correct tokens and the routers' losses.

        Only the writes have to follow one another.
        """
        sizes = [before.layout.num_tokens for before in look_backs]
        layers = torch.split(self.encode(side_by_side(look_backs)), sizes, dim=1)
        memories, gates = [], []
        for encoded, before, at in zip(layers, look_backs, positions, strict=True):
            stm, values = self.write(self.with_resets(stm, at), encoded, before)
            memories.append(stm)
            gates.append(values)
        asked = side_by_side(positions)
        output = self.decode(torch.cat(memories, dim=1), asked)
        rows = take_rows(output.hidden, asked.next_index)
        loss, correct = self.call("decoder.lm_head", rows, asked.next_targets)
        return stm, torch.stack(gates).sum(0), (loss, correct, output.aux_sum, output.z_sum)

    def run(
        self, batch: WindowBatch, stm: torch.Tensor | None
    ) -> tuple[dict[str, Term], torch.Tensor | None]:
        """Sums over a window. ``stm`` fp32 [L, b, S, D] is the STM before the first look-back's write;
        returned is the STM that the last interaction was answered with, detached."""
        assert stm is not None
        carried, found = self.through_window(batch, stm)
        terms = {
            "answer_loss": Term(add_sums(found, 0), "answer"),
            "answer_accuracy": Term(add_sums(found, 1), "answer"),
        }
        return terms | self.router_terms(add_sums(found, 2), add_sums(found, 3)), carried
