"""What the two stages over conversation lanes share: fresh memories, resets, recomputation, statistics.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width, W positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rxt_dist.config import RunConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch
from rxt_dist.kernels.cross_entropy import repeated_later
from rxt_dist.model import RxTModel
from rxt_dist.model.memory_attention import GateValues
from rxt_dist.model.stm import draw_stm, initial_stm, redraw_stm
from rxt_dist.parallel.rooms import exact_rooms
from rxt_dist.randomness import derive_key, fold_in_tensor, signed_key
from rxt_dist.stages.base import StageModule
from rxt_dist.stages.expert_statistics import not_counted
from rxt_dist.stages.memory_statistics import MemorySums, gate_sums


class FreshMemory:
    """Initial STM of conversations, a pure function of the seed and the visit of the conversation.

    With ``stm_init.shared`` all conversations get the same draw.
    """

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model
        self._key = signed_key(derive_key(config.seed, "stm"))
        self._shared: torch.Tensor | None = None
        if config.model.stm_init.shared:
            self._shared = initial_stm(config.model, config.seed)

    def draw(self, visits: torch.Tensor) -> torch.Tensor:
        """fp32 [L, b, S, D] for the conversations of ``visits`` int64 [b]."""
        if self._shared is None:
            return draw_stm(self._model, fold_in_tensor(visits, self._key))
        if self._shared.device != visits.device:
            self._shared = self._shared.to(visits.device)
        return self._shared.expand(-1, visits.shape[0], -1, -1)

    def reset(self, stm: torch.Tensor, where: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
        """``stm`` [L, b, S, D], with the initial one of ``visits`` int64 [b] in lanes ``where`` bool [b]."""
        if self._shared is None:
            return redraw_stm(self._model, stm, where, fold_in_tensor(visits, self._key))
        return torch.where(where.view(1, -1, 1, 1), self.draw(visits).to(stm), stm)


@contextmanager
def _first_time() -> Iterator[None]:
    with repeated_later(), exact_rooms():
        yield


@contextmanager
def _second_time(module: nn.Module) -> Iterator[None]:
    with not_counted(module), exact_rooms():
        yield


Sums = tuple[torch.Tensor, ...]
"""Scalars that positions of a window add to the terms of a stage."""
Positions = tuple[LaneInteractions, ...]


class LaneStageModule(StageModule):
    """A stage whose lanes carry an STM from step to step."""

    def __init__(self, model: RxTModel, config: RunConfig) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.memory_attention = model.memory_attention
        self.fresh = FreshMemory(config)
        self._recomputes = config.runtime.recompute == "interaction"
        self._shape = (config.model.decoder.num_layers, config.model.stm_size, config.model.embed_dim)
        self.memory_sums: MemorySums | None = None
        """What is collected between :meth:`observe` and :meth:`observations`."""

    @abstractmethod
    def advance(
        self, stm: torch.Tensor, look_backs: Positions, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Consecutive ``positions`` of a window, from the STM [L, b, S, D] that the lanes hold.

        ``look_backs`` are what the stage writes before it looks at each, or empty if it does not read
        that. Returns the STM that the lanes hold then, the gate sums (fp64 [3]) of the writes, and the sums
        of these positions.
        """

    def through_window(self, batch: WindowBatch, stm: torch.Tensor) -> tuple[torch.Tensor, list[Sums]]:
        """The STM that is carried out of a window, without gradient, and the sums of its positions.

        What does not depend on the STM is computed for all positions at once. With ``runtime.recompute:
        interaction`` they are computed one by one: only the STM is kept between them, the rest is computed
        again in the backward pass. That of the last position would be needed at once.
        """
        if not (self._recomputes and torch.is_grad_enabled()):
            stm, gates, sums = self.advance(stm, batch.look_backs, batch.positions)
            return self._carried(batch, stm, [gates]), [sums]
        found, gate_values = [], []
        last = len(batch.positions) - 1
        for number in range(last + 1):
            arguments = (stm, batch.look_backs[number : number + 1], batch.positions[number : number + 1])
            if number < last:
                # Nothing random has a state: every draw is a function of its keys.
                stm, gates, sums = checkpoint(
                    self.advance,
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=lambda: (_first_time(), _second_time(self)),
                )
            else:
                stm, gates, sums = self.advance(*arguments)
            found.append(sums)
            gate_values.append(gates)
        return self._carried(batch, stm, gate_values), found

    def _carried(self, batch: WindowBatch, stm: torch.Tensor, gates: Sequence[torch.Tensor]) -> torch.Tensor:
        """``stm`` without gradient; it and ``gates`` are taken into the statistics."""
        carried = stm.detach()
        if self.memory_sums is not None:
            for values in gates:
                self.memory_sums.add_gates(values)
            written = batch.look_backs[-1] if batch.look_backs else batch.positions[-1]
            self.memory_sums.add_memory(carried, written.present)
        return carried

    def write_encoded(
        self, stm: torch.Tensor, encoded: torch.Tensor, at: LaneInteractions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The STM after ``at``, encoded as [L, N, D], was written, and the gate sums; lanes without an
        interaction keep theirs."""
        gates: GateValues | None = None if self.memory_sums is None else {}
        written: torch.Tensor = self.call("memory_attention", stm, encoded, at.layout, at.present, gates)
        return written, gate_sums((gates or {}).get("gate"), at.present, stm.shape)

    def with_resets(self, stm: torch.Tensor, at: LaneInteractions) -> torch.Tensor:
        """The STM that interaction ``at`` of every lane starts from: ``stm``, or a fresh one where a
        conversation begins. A mask, not a branch: the gradient of a reset lane is zero, not missing."""
        return self.fresh.reset(stm, at.reset, at.visits)

    def observe(self, device: torch.device | None) -> None:
        super().observe(device)
        self.memory_sums = None if device is None else MemorySums(self._shape, device)

    def observations(self, counts: Mapping[str, int]) -> dict[str, float | None]:
        assert self.memory_sums is not None
        share = counts["resets"] / max(1, counts["interactions"])
        memory = {**self.memory_sums.statistics(), "reset_share": share}
        return {**memory, **super().observations(counts)}

    def local_counts(self, batch: WindowBatch) -> dict[str, int]:
        return window_counts(batch)

    @property
    def generates(self) -> bool:
        return False


def window_counts(batch: WindowBatch) -> dict[str, int]:
    """Tokens, supervised answer tokens and interactions of a window."""
    positions = batch.positions
    return {
        "tokens": sum(int(at.present[at.layout.sequence_ids].sum()) for at in positions),
        "answer": sum(at.next_index.numel() for at in positions),
        "interactions": sum(int(at.present.sum()) for at in positions),
    }


def add_sums(found: Sequence[Sums], column: int) -> torch.Tensor:
    """Sum of one of the scalars over the positions of a window."""
    return torch.stack([sums[column] for sums in found]).sum()
