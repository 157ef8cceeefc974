"""What the two stages over conversation lanes share: fresh memories and resets.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rxt_dist.config import RunConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.model.stm import draw_stm
from rxt_dist.randomness import derive_key, fold_in_tensor, signed_key
from rxt_dist.stages.base import StageModule


class FreshMemory:
    """Initial STM of conversations, a pure function of the seed and the visit of the conversation.

    With ``stm_init.shared`` all conversations get the same draw.
    """

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model
        self._key = signed_key(derive_key(config.seed, "stm"))
        self._shared: torch.Tensor | None = None
        if config.model.stm_init.shared:
            self._shared = draw_stm(config.model, torch.tensor([self._key]))

    def draw(self, visits: torch.Tensor) -> torch.Tensor:
        """fp32 [L, b, S, D] for the conversations of ``visits`` int64 [b]."""
        if self._shared is None:
            return draw_stm(self._model, fold_in_tensor(visits, self._key))
        if self._shared.device != visits.device:
            self._shared = self._shared.to(visits.device)
        return self._shared.expand(-1, visits.shape[0], -1, -1)


class LaneStageModule(StageModule):
    """A stage whose lanes carry an STM from step to step."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.fresh = FreshMemory(config)

    def with_resets(self, stm: torch.Tensor, at: LaneInteractions) -> torch.Tensor:
        """The STM that interaction ``at`` of every lane starts from: ``stm``, or a fresh one where a
        conversation begins. A mask, not a branch: the gradient of a reset lane is zero, not missing."""
        return torch.where(at.reset.view(1, -1, 1, 1), self.fresh.draw(at.visits).to(stm), stm)

    def local_counts(self, batch: WindowBatch) -> dict[str, int]:
        positions = batch.positions
        return {
            "tokens": sum(int(at.present[at.layout.sequence_ids].sum()) for at in positions),
            "answer": sum(at.next_index.numel() for at in positions),
            "interactions": sum(int(at.present.sum()) for at in positions),
        }

    @property
    def generates(self) -> bool:
        return False


def add_sums(totals: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the scalars of a window's positions."""
    return torch.stack(list(totals)).sum()
