"""Answers that read the encodings of earlier interactions: what the STM shall hold, before there is one.

At every position of a window the decoder answers an interaction while its memory cross-attention reads the
encodings of all interactions of the conversation that the window has passed. Encoder and decoder learn here
to put what belongs together into one row and to find it again. Through an STM neither is learned: see
docs/memory.md.

Shape legend: L memory layers, b lanes of a micro-batch, W positions of a window, B readers, N tokens of one
interaction of every reader, M rows that were encoded, C pairs of a reader and a row, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch, side_by_side
from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.kernels.permute import take_rows
from rxt_dist.model import DecoderOutput, Memory, RxTModel, SequenceLayout
from rxt_dist.stages.base import StageModule, Term, router_weights
from rxt_dist.stages.lane_stage import window_counts


@dataclass(frozen=True, eq=False)
class Encodings:
    """Encoded interactions, and which of B readers reads which of their rows.

    Attributes:
        layers: [L, M, D]; rows: int64 [C] the rows that readers have, those of older interactions first.
            readers: int64 [C] whose each of them is, B for one that nobody reads.
        longest: upper bound of the rows of a reader.
    """

    layers: torch.Tensor
    rows: torch.Tensor
    readers: torch.Tensor
    longest: int

    def extended(self, layers: torch.Tensor, at: LaneInteractions) -> Encodings:
        """With ``layers`` [L, N, D] of the interaction ``at`` of every reader, for those that have one."""
        ids = at.layout.sequence_ids
        new = torch.arange(ids.shape[0], device=ids.device) + self.layers.shape[1]
        readers = ids.masked_fill(~at.present[ids], at.layout.num_sequences)
        return Encodings(
            torch.cat((self.layers, layers), dim=1),
            torch.cat((self.rows, new)),
            torch.cat((self.readers, readers)),
            self.longest + at.layout.max_seqlen,
        )

    def of_neighbours(self, readers: int) -> Encodings:
        """Each of B ``readers`` has what the one before it had."""
        shifted = torch.where(self.readers < readers, (self.readers + 1) % readers, self.readers)
        return replace(self, readers=shifted)

    def memory(self, layout: SequenceLayout) -> Memory:
        """What the sequences of ``layout`` read, one for each reader; attention to nothing gives 0."""
        readers, order = self.readers.sort(stable=True)
        bounds = torch.arange(layout.num_sequences + 1, device=readers.device)
        cu_k = torch.searchsorted(readers, bounds).to(torch.int32)
        rows = self.rows[order]
        groups = AttentionLayout(layout.cu_seqlens, cu_k, layout.max_seqlen, self.longest, rows, slack=True)
        return Memory(self.layers, groups)


def window_encodings(layers: torch.Tensor, batch: WindowBatch) -> Encodings:
    """What the positions of a window read, reader ``w * b + i`` being lane i at position w.

    ``layers`` [L, M, D] are those of ``batch.look_backs``, side by side.
    """
    looked, resets = side_by_side(batch.look_backs), torch.stack([at.reset for at in batch.positions])
    window, lanes = resets.shape
    place = torch.arange(window, device=layers.device).unsqueeze(1)
    begun = torch.where(resets, place, 0).cummax(dim=0).values  # [W, b]
    lane, at = looked.layout.sequence_ids % lanes, looked.layout.sequence_ids // lanes  # [M]
    read = (at <= place) & (at >= begun[:, lane]) & looked.present[looked.layout.sequence_ids]
    readers = torch.where(read, place * lanes + lane, window * lanes)  # [W, M]
    rows = torch.arange(lane.shape[0], device=layers.device)
    ends = list(accumulate(before.tokens.shape[0] for before in batch.look_backs))
    return Encodings(
        layers,
        torch.cat([rows[:end] for end in ends]),
        torch.cat([readers[w, :end] for w, end in enumerate(ends)]),
        sum(before.layout.max_seqlen for before in batch.look_backs),
    )


class ContextModule(StageModule):
    """Stage ``context_sft``: encoder and decoder, without a memory attention between them."""

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.decoder = model.decoder
        self._width = config.model.embed_dim
        self.weights = {"answer_loss": 1.0, "answer_accuracy": 0.0, **router_weights(config, 1.0)}

    def nothing(self) -> Encodings:
        """What readers have before they have read."""
        device = next(self.decoder.parameters()).device
        none = torch.zeros(len(self.decoder.layers), 0, self._width, dtype=self.weight_dtype, device=device)
        nobody = torch.zeros(0, dtype=torch.int64, device=device)
        return Encodings(none, nobody, nobody, 0)

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
        """Sums over a window, which starts from nothing read. ``stm`` is returned as it came.

        No position needs the result of another one, so that all are computed together.
        """
        looked, asked = side_by_side(batch.look_backs), side_by_side(batch.positions)
        seen = window_encodings(self.encoder(looked.tokens, looked.layout), batch)
        output = self.decode(seen, asked)
        rows = take_rows(output.hidden, asked.next_index)
        loss, correct = self.decoder.lm_head(rows, asked.next_targets)
        terms = {"answer_loss": Term(loss, "answer"), "answer_accuracy": Term(correct, "answer")}
        return terms | self.router_terms(output.aux_sum, output.z_sum), stm

    def local_counts(self, batch: Any) -> dict[str, int]:
        return window_counts(batch)

    @property
    def generates(self) -> bool:
        return False
