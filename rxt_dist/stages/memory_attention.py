"""Self-supervised pretraining of memory attention: the updated memory should resemble a weighted mean of
the memory before and the new interaction's encoding, slot by token position.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width, N tokens,
T width of a padded interaction: the larger of S and the longest interaction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rxt_dist.config import RunConfig, SpecialTokens, StageConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.kernels.compilation import compiled, recording
from rxt_dist.kernels.noise import with_noise
from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.randomness import derive_key, fold_in_tensor, normal_tensor, signed_key, uniform_tensor
from rxt_dist.stages.base import NEVER, Term, layer_keys
from rxt_dist.stages.lane_stage import LaneStageModule, Positions, Sums, add_sums
from rxt_dist.stages.write_losses import COSINE_EPS, write_losses

# Published weights of the new data: 0.9 for a conversation's first interaction, then 0.5 falling by 0.05.
_FIRST_WEIGHT, _BASE_WEIGHT, _WEIGHT_STEP = 0.9, 0.5, 0.05


class MemoryAttentionModule(LaneStageModule):
    """Stage ``memory_attention``: only memory attention trains; the encoder is read without gradient.

    A lane carries the detached STM after the last interaction's write.
    """

    def __init__(self, model: RxTModel, config: RunConfig, stage: StageConfig) -> None:
        super().__init__(model, config)
        self.stage = stage
        self.stm_size = config.model.stm_size
        self.starts = {"encoder": NEVER}
        self.weights = {"memory_loss": 1.0, "stm_difference": stage.stm_difference_scale}
        special = config.model.special_tokens
        assert isinstance(special, SpecialTokens)
        self._pad_id = special.pad
        self._jitter_key = signed_key(derive_key(config.seed, "label_jitter"))
        self._slot_key = signed_key(derive_key(config.seed, "label_slots"))

    def local_counts(self, batch: WindowBatch) -> dict[str, int]:
        used = (at.layout.cu_seqlens.diff()[at.present].clamp(max=self.stm_size) for at in batch.positions)
        return {**super().local_counts(batch), "slots": sum(int(slots.sum()) for slots in used)}

    def advance(
        self, stm: torch.Tensor, look_backs: Positions, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Write ``positions``: sums of the distance to the label, over slots, and of the difference term."""
        assert not look_backs
        gates, found = [], []
        for at in positions:
            stm, values, sums = self._write(self.with_resets(stm, at), at)
            gates.append(values)
            found.append(sums)
        return stm, torch.stack(gates).sum(0), (add_sums(found, 0), add_sums(found, 1))

    def _write(self, stm: torch.Tensor, at: LaneInteractions) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """The STM after ``at``, the gate sums, and the sums of :meth:`advance`."""
        with recording(False, training=self.training):
            layers, padded = self._encode(at)
        noisy = layers
        if (keys := self._noise_keys("noise", self.stage.noise_level, at.token_keys)) is not None:
            noisy = with_noise(layers, keys, self.stage.noise_level)
        after, gates = self.write_encoded(stm, noisy, at)
        level = self.stage.label_noise_level
        noise = self._noise_keys("label_noise", level, at.token_keys)
        weights, factors = self.label_weights(at), torch.sqrt(at.numbers + 1.0)
        distance, difference = write_losses(
            after, stm, layers, weights, factors, at.layout, at.present, noise, level
        )
        if self.stage.unused_slots != "ignored":
            distance = distance + self._unused_distance(after, stm.detach(), padded, at)
        return after, gates, (distance, difference)

    def run(
        self, batch: WindowBatch, stm: torch.Tensor | None
    ) -> tuple[dict[str, Term], torch.Tensor | None]:
        """Sums over a window. ``stm`` fp32 [L, b, S, D] and the STM returned are those after a write."""
        assert stm is not None
        carried, found = self.through_window(batch, stm)
        memory_loss = Term(add_sums(found, 0), "slots")
        if self.stage.unused_slots != "ignored":
            memory_loss = Term(add_sums(found, 0) / self.stm_size, "interactions")
        return {
            "memory_loss": memory_loss,
            "stm_difference": Term(add_sums(found, 1), "interactions"),
        }, carried

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

    def _encode(self, at: LaneInteractions) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The encoder's layers of the tokens [L, N, D] and, if the labels need them, of padded
        interactions [L, b, T, D]."""
        if self.stage.unused_slots != "reference":
            return self.encoder(at.tokens, at.layout), None
        width = max(self.stm_size, at.layout.max_seqlen)
        tokens, layout, rows = pad_interactions(at, width, self._pad_id)
        padded = self.encoder(tokens, layout)
        return padded[:, rows], padded.unflatten(1, (-1, width))

    def _noise_keys(self, purpose: str, level: float, keys: torch.Tensor) -> torch.Tensor | None:
        """A key for every layer and row of noise, by ``keys`` [N]: int64 [L, N]; None: there is no noise."""
        if not self.training or level == 0:
            return None
        return layer_keys(keys, purpose, self.memory_attention.layers)

    def _unused_distance(
        self, after: torch.Tensor, before: torch.Tensor, padded: torch.Tensor | None, at: LaneInteractions
    ) -> torch.Tensor:
        """The distance of :func:`write_losses` over slots that have no token: their label is the memory
        before, or with ``padded`` [L, b, T, D] its weighted mean with the encoding of padding."""
        level = self.stage.label_noise_level
        slots = torch.arange(self.stm_size, device=after.device)
        lane_keys = fold_in_tensor(fold_in_tensor(at.visits, self._slot_key), at.numbers)
        keys = fold_in_tensor(lane_keys.unsqueeze(1), slots).flatten()
        noise = self._noise_keys("label_noise", level, keys)
        unused = (slots >= at.layout.cu_seqlens.diff().unsqueeze(1)) & at.present.unsqueeze(1)
        return _slot_distance(after, before, padded, self.label_weights(at), unused, noise, level)


@compiled
def _slot_distance(
    after: torch.Tensor,
    before: torch.Tensor,
    padded: torch.Tensor | None,
    weights: torch.Tensor,
    unused: torch.Tensor,
    noise: torch.Tensor | None,
    level: float,
) -> torch.Tensor:
    """See :meth:`MemoryAttentionModule._unused_distance`; ``unused`` bool [b, S]."""
    label = before
    if padded is not None:
        new = weights.view(1, -1, 1, 1)
        label = (1.0 - new) * before + new * padded[:, :, : before.shape[2]].to(before.dtype)
    if noise is not None:
        label = label + (normal_tensor(noise, label.shape[-1]) * level).view(label.shape)
    cosine = F.cosine_similarity(after, label, dim=-1, eps=COSINE_EPS)
    return -torch.where(unused, cosine, 0.0).mean(dim=0).sum()


def pad_interactions(
    at: LaneInteractions, width: int, pad_id: int
) -> tuple[torch.Tensor, SequenceLayout, torch.Tensor]:
    """The interactions at ``width`` tokens each, their layout, and the rows of the real tokens, int64 [N].

    Padding reads the real tokens of its interaction and is read by none.
    """
    lanes = at.layout.num_sequences
    device = at.tokens.device
    rows = at.layout.sequence_ids * width + at.layout.positions
    tokens = torch.full((lanes * width,), pad_id, dtype=at.tokens.dtype, device=device)
    tokens[rows] = at.tokens
    boundaries = torch.arange(lanes + 1, dtype=torch.int32, device=device) * width
    numbers = torch.arange(lanes * width, device=device)
    layout = SequenceLayout(
        cu_seqlens=boundaries,
        max_seqlen=width,
        positions=numbers % width,
        sequence_ids=numbers // width,
        attention=AttentionLayout(boundaries, at.layout.cu_seqlens, width, at.layout.max_seqlen, rows),
    )
    return tokens, layout, rows
