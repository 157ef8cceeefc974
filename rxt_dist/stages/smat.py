"""Supervised memory-aware training: answer while reading a memory that the model itself wrote.

At every position of a window the interaction before it is encoded and written into the lane's STM, then
the decoder answers the interaction at that position while reading the STM. A lane carries the detached STM
from *before* its last write, so that the write is repeated inside the next window's graph: carrying its
result would leave encoder and memory attention without a gradient when a window has one interaction.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.kernels.cross_entropy import linear_cross_entropy
from rxt_dist.model import Memory, RxTModel
from rxt_dist.stages.base import CROSS_ENTROPY_CHUNK, Term, aux_weight
from rxt_dist.stages.lane_stage import LaneStageModule, add_sums


class SmatModule(LaneStageModule):
    """Stage ``smat``: encoder, memory attention and decoder, less what ``frozen`` names."""

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__(config)
        self.frozen = tuple(stage.frozen)
        self.encoder = model.encoder
        self.memory_attention = model.memory_attention
        self.decoder = model.decoder
        self.weights = {"answer_loss": 1.0, "answer_accuracy": 0.0, **aux_weight(config, 1.0)}

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of frozen components; the embedding is part of both encoder and decoder."""
        for name in self.frozen:
            yield from self.get_submodule(name).parameters()

    def write(self, stm: torch.Tensor, at: LaneInteractions) -> torch.Tensor:
        """The STM after interaction ``at`` was written; lanes without one keep theirs."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "encoder" not in self.frozen):
            layers = self.encoder(at.tokens, at.layout)
        written: torch.Tensor = self.memory_attention(stm, layers, at.layout, at.present)
        return written

    def decode(self, stm: torch.Tensor, at: LaneInteractions) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, D] of interaction ``at`` read with ``stm`` [L, b, S, D], and the balance sum."""
        memory = Memory.of_stm(stm.to(self.decoder.lm_head.weight.dtype), at.layout)
        output = self.decoder(at.tokens, at.layout, memory)
        return output.hidden, output.aux_sum

    def run(
        self, batch: WindowBatch, stm: torch.Tensor | None
    ) -> tuple[dict[str, Term], torch.Tensor | None]:
        """Sums over a window. ``stm`` fp32 [L, b, S, D] is the STM before the look-back's write; returned
        is the STM before the write of the last interaction, detached."""
        assert stm is not None
        assert batch.look_back is not None
        losses, corrects, balances = [], [], []
        before = stm
        previous = batch.look_back
        for at in batch.positions:
            before = self.with_resets(self.write(before, previous), at)
            hidden, balance = self.decode(before, at)
            head = self.decoder.lm_head
            loss, correct = linear_cross_entropy(
                hidden.index_select(0, at.next_index),
                head.weight,
                head.bias,
                at.next_targets,
                CROSS_ENTROPY_CHUNK,
            )
            losses.append(loss)
            corrects.append(correct)
            balances.append(balance)
            previous = at
        terms = {
            "answer_loss": Term(add_sums(losses), "answer"),
            "answer_accuracy": Term(add_sums(corrects), "answer"),
        }
        if "aux_loss" in self.weights:
            terms["aux_loss"] = Term(add_sums(balances), "tokens")
        return terms, before.detach()
