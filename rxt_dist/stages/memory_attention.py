"""Self-supervised pretraining of memory attention: the updated memory should resemble a weighted mean of
the memory before and the new interaction's encoding, slot by token position.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width, N tokens,
T slots that can have a token: min(S, longest interaction).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.model import RxTModel
from rxt_dist.randomness import derive_key, fold_in_tensor, normal_tensor, signed_key, uniform_tensor
from rxt_dist.stages.base import Term, layer_keys
from rxt_dist.stages.lane_stage import LaneStageModule, add_sums

# Published weights of the new data: 0.9 for a conversation's first interaction, then 0.5 falling by 0.05.
_FIRST_WEIGHT, _BASE_WEIGHT, _WEIGHT_STEP = 0.9, 0.5, 0.05
_COSINE_EPS = 1e-8


class MemoryAttentionModule(LaneStageModule):
    """Stage ``memory_attention``: only memory attention trains; the encoder is read without gradient.

    A lane carries the detached STM after the last interaction's write.
    """

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__(config)
        self.stage = stage
        self.stm_size = config.model.stm_size
        self.encoder = model.encoder
        self.memory_attention = model.memory_attention
        self.weights = {"memory_loss": 1.0, "stm_difference": stage.stm_difference_scale}
        self._jitter_key = signed_key(derive_key(config.seed, "label_jitter"))

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        return self.encoder.parameters()

    def local_counts(self, batch: WindowBatch) -> dict[str, int]:
        used = (at.layout.cu_seqlens.diff()[at.present].clamp(max=self.stm_size) for at in batch.positions)
        return {**super().local_counts(batch), "slots": sum(int(slots.sum()) for slots in used)}

    def run(
        self, batch: WindowBatch, stm: torch.Tensor | None
    ) -> tuple[dict[str, Term], torch.Tensor | None]:
        """Sums over a window. ``stm`` fp32 [L, b, S, D] and the STM returned are those after a write."""
        assert stm is not None
        distances, differences = [], []
        for at in batch.positions:
            before = self.with_resets(stm, at)
            with torch.no_grad():
                layers = self.encoder(at.tokens, at.layout)
            stm = self.memory_attention(before, self._noisy(layers, "noise", at), at.layout, at.present)
            distances.append(self._distance(stm, before.detach(), layers.to(stm.dtype), at))
            scale = torch.sqrt(at.numbers + 1.0)
            differences.append(((stm - before) ** 2).mean(dim=(0, 2, 3)).mul(scale).sum())
        terms = {
            "memory_loss": Term(add_sums(distances), "slots"),
            "stm_difference": Term(add_sums(differences), "interactions"),
        }
        return terms, stm.detach()

    def label_weights(self, at: LaneInteractions) -> torch.Tensor:
        """Weight of the new data in the label of every lane: fp32 [b]; the old memory has the rest."""
        stage = self.stage
        later = (_BASE_WEIGHT - _WEIGHT_STEP * at.numbers).clamp(min=stage.label_weight_floor)
        weights = torch.where(at.numbers == 0, _FIRST_WEIGHT, later)
        if not self.training or stage.label_weight_jitter == 0:
            return weights
        keys = fold_in_tensor(fold_in_tensor(at.visits, self._jitter_key), at.numbers)
        size = uniform_tensor(keys) * stage.label_weight_jitter
        upwards = uniform_tensor(fold_in_tensor(keys, 1)) < 0.5
        return (weights + torch.where(upwards, size, -size)).clamp(0.0, 1.0)

    def _noisy(self, layers: torch.Tensor, purpose: str, at: LaneInteractions) -> torch.Tensor:
        """``layers`` [L, N, D] with the noise of the input (``noise``) or of the label (``label_noise``)."""
        level = self.stage.noise_level if purpose == "noise" else self.stage.label_noise_level
        if not self.training or level == 0:
            return layers
        noise = normal_tensor(layer_keys(at.token_keys, purpose, layers.shape[0]), layers.shape[-1])
        return layers + (noise * level).to(layers.dtype)

    def _distance(
        self, after: torch.Tensor, before: torch.Tensor, layers: torch.Tensor, at: LaneInteractions
    ) -> torch.Tensor:
        """Negative cosine between memory and label, summed over slots that have a token, mean over layers.

        ``after``, ``before`` [L, b, S, D]; ``layers`` [L, N, D]. Slot s of a lane belongs to the token at
        position s; slots without one, and tokens beyond the last slot, are left out.
        """
        lanes, positions = at.layout.sequence_ids, at.layout.positions
        slots = positions.clamp(max=self.stm_size - 1)
        new = self.label_weights(at)[lanes].unsqueeze(-1)
        label = (1.0 - new) * before[:, lanes, slots] + new * layers
        label = self._noisy(label, "label_noise", at)
        cosine = F.cosine_similarity(after[:, lanes, slots], label, dim=-1, eps=_COSINE_EPS)
        counted = (positions < self.stm_size) & at.present[lanes]
        return -torch.where(counted, cosine, 0.0).mean(dim=0).sum()
