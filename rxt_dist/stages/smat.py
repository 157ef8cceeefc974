"""Supervised memory-aware training: answer while reading a memory that the model itself wrote.

At every position of a window the interaction before it is encoded and written into the lane's STM, then
the decoder answers the interaction at that position while reading the STM. A lane carries the detached STM
from *before* its last write, so that the write is repeated inside the next window's graph: carrying its
result would leave encoder and memory attention without a gradient when a window has one interaction.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width, N tokens.
"""

from __future__ import annotations

import torch

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.config.run import COMPONENTS
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.kernels.compilation import recording
from rxt_dist.kernels.permute import take_rows
from rxt_dist.model import DecoderOutput, Memory, RxTModel
from rxt_dist.stages.base import NEVER, Term, router_weights
from rxt_dist.stages.lane_stage import LaneStageModule, Sums, add_sums


class SmatModule(LaneStageModule):
    """Stage ``smat``: encoder, memory attention and decoder, each from the step that the stage says."""

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__(model, config)
        self.decoder = model.decoder
        self.system_prompts = stage.system_prompts
        for name in COMPONENTS:
            self.starts[name] = NEVER if name in stage.frozen else stage.unfreeze.steps().get(name, 0)
        self.weights = {"answer_loss": 1.0, "answer_accuracy": 0.0, **router_weights(config, 1.0)}

    def write(self, stm: torch.Tensor, at: LaneInteractions) -> tuple[torch.Tensor, torch.Tensor]:
        """The STM after interaction ``at`` was written, and the gate sums; lanes without one keep theirs."""
        grad, training = torch.is_grad_enabled(), self.training
        encoder = grad and self.trains("encoder")
        with recording(encoder, training=training):
            layers = self.encoder(at.tokens, at.layout)
        with recording(encoder or (grad and self.trains("memory_attention")), training=training):
            return self.write_encoded(stm, layers, at)

    def decode(self, stm: torch.Tensor, at: LaneInteractions) -> DecoderOutput:
        """The decoder's output for interaction ``at`` read with ``stm`` [L, b, S, D]."""
        memory = Memory.of_stm(stm.to(self.weight_dtype), at.layout)
        output: DecoderOutput = self.call("decoder", at.tokens, at.layout, memory)
        return output

    def advance(
        self, stm: torch.Tensor, before: LaneInteractions | None, at: LaneInteractions
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Write ``before``, answer ``at``: sums of loss, correct tokens and the routers' losses."""
        assert before is not None
        stm, gates = self.write(self.with_resets(stm, at), before)
        output = self.decode(stm, at)
        rows = take_rows(output.hidden, at.next_index)
        loss, correct = self.call("decoder.lm_head", rows, at.next_targets)
        return stm, gates, (loss, correct, output.aux_sum, output.z_sum)

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
        if "aux_loss" in self.weights:
            terms["aux_loss"] = Term(add_sums(found, 2), "tokens")
        if "z_loss" in self.weights:
            terms["z_loss"] = Term(add_sums(found, 3), "tokens")
        return terms, carried
