"""Answers that read the encodings of earlier interactions: what the STM shall hold, before there is one.

At every position of a window the interaction before it is encoded, then the decoder answers the one at that
position while its memory cross-attention reads the encodings of all interactions of the conversation that
the window has passed. Encoder and decoder learn here to put what belongs together into one row and to find
it again. Through an STM neither is learned: see docs/memory.md.

Shape legend: L memory layers, b lanes of a micro-batch, N tokens of one interaction of every lane, M of all
that were read, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.kernels.permute import take_rows
from rxt_dist.model import DecoderOutput, Memory, RxTModel, SequenceLayout
from rxt_dist.stages.base import StageModule, Term, router_weights
from rxt_dist.stages.lane_stage import window_counts


@dataclass(frozen=True, eq=False)
class Encodings:
    """Encoder layers of the interactions that b lanes have read.

    Attributes:
        lanes: b.
        layers: [L, N, D] of each interaction that was read; owners: int64 [N] the lane of every row, b for
            one that no lane reads (again). longest: upper bound of the rows of a lane.
    """

    lanes: int
    layers: tuple[torch.Tensor, ...]
    owners: tuple[torch.Tensor, ...]
    longest: int

    def without(self, forgotten: torch.Tensor) -> Encodings:
        """Lanes of which ``forgotten`` bool [b] is set have nothing left."""
        lane_or_none = torch.arange(self.lanes + 1, device=forgotten.device)
        lane_or_none[:-1].masked_fill_(forgotten, self.lanes)
        return replace(self, owners=tuple(lane_or_none[owner] for owner in self.owners))

    def extended(self, layers: torch.Tensor, at: LaneInteractions) -> Encodings:
        """With ``layers`` [L, N, D] of the interaction ``at`` of every lane, in those that have one."""
        ids = at.layout.sequence_ids
        owner = ids.masked_fill(~at.present[ids], self.lanes)
        longest = self.longest + at.layout.max_seqlen
        return Encodings(self.lanes, (*self.layers, layers), (*self.owners, owner), longest)

    def of_neighbours(self) -> Encodings:
        """Every lane has what the lane before it had."""
        shifted = (torch.where(own < self.lanes, (own + 1) % self.lanes, own) for own in self.owners)
        return replace(self, owners=tuple(shifted))

    def memory(self, layout: SequenceLayout) -> Memory:
        """What sequence b of ``layout`` reads: the rows of lane b, oldest first; attention to none gives 0.

        Waits for the device: how many rows are read depends on where conversations begin.
        """
        owners, order = torch.cat(self.owners).sort(stable=True)
        cu_k = torch.searchsorted(owners, torch.arange(self.lanes + 1, device=owners.device))
        rows = torch.cat(self.layers, dim=1).index_select(1, order[: int(cu_k[-1])])
        groups = AttentionLayout(layout.cu_seqlens, cu_k.to(torch.int32), layout.max_seqlen, self.longest)
        return Memory(rows, groups)


class ContextModule(StageModule):
    """Stage ``context_sft``: encoder and decoder, without a memory attention between them."""

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.decoder = model.decoder
        self._width = config.model.embed_dim
        self.weights = {"answer_loss": 1.0, "answer_accuracy": 0.0, **router_weights(config, 1.0)}

    def nothing(self, lanes: int) -> Encodings:
        """What ``lanes`` lanes have before they have read."""
        device = next(self.decoder.parameters()).device
        none = torch.zeros(len(self.decoder.layers), 0, self._width, dtype=self.weight_dtype, device=device)
        owners = torch.zeros(0, dtype=torch.int64, device=device)
        return Encodings(lanes, (none,), (owners,), 0)

    def read(self, seen: Encodings, at: LaneInteractions) -> Encodings:
        """``seen`` and the encoding of interaction ``at``."""
        return seen.extended(self.encoder(at.tokens, at.layout), at)

    def decode(self, seen: Encodings, at: LaneInteractions) -> DecoderOutput:
        """The decoder's output for interaction ``at`` read with ``seen``."""
        output: DecoderOutput = self.decoder(at.tokens, at.layout, seen.memory(at.layout))
        return output

    def run(
        self, batch: WindowBatch, stm: torch.Tensor | None
    ) -> tuple[dict[str, Term], torch.Tensor | None]:
        """Sums over a window, which starts from nothing read. ``stm`` is returned as it came."""
        seen = self.nothing(batch.lanes.shape[0])
        found = []
        for before, at in zip(batch.look_backs, batch.positions, strict=True):
            seen = self.read(seen.without(at.reset), before)
            output = self.decode(seen, at)
            rows = take_rows(output.hidden, at.next_index)
            loss, correct = self.decoder.lm_head(rows, at.next_targets)
            found.append((loss, correct, output.aux_sum, output.z_sum))
        loss, correct, balance, z = (torch.stack(column).sum() for column in zip(*found, strict=True))
        terms = {"answer_loss": Term(loss, "answer"), "answer_accuracy": Term(correct, "answer")}
        if "aux_loss" in self.weights:
            terms["aux_loss"] = Term(balance, "tokens")
        if "z_loss" in self.weights:
            terms["z_loss"] = Term(z, "tokens")
        return terms, stm

    def local_counts(self, batch: Any) -> dict[str, int]:
        return window_counts(batch)

    @property
    def generates(self) -> bool:
        return False
