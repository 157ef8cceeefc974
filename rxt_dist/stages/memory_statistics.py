"""Statistics of the memory during training and evaluation, over the lanes of all ranks.

They are made of sums, so that they do not depend on how lanes are divided into micro-batches and ranks.

Shape legend: L memory layers, b lanes of a micro-batch, S STM slots, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rxt_dist.parallel.collectives import sum_over_ranks

MEMORY_STATISTICS = (
    "memory_rms",
    "memory_between_share",
    "memory_slot_cosine",
    "write_gate_mean",
    "write_gate_std",
)
_ENERGY, _COSINE, _LANES, _GATE, _GATE_SQUARE, _GATES = range(6)


class MemorySums:
    """Sums on the device; nothing waits for it before :meth:`statistics`.

    ``shape`` is [L, S, D], the STM of one lane.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._total = torch.zeros(tuple(shape), dtype=torch.float64, device=device)
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add_memory(self, stm: torch.Tensor, written: torch.Tensor) -> None:
        """Count the lanes of ``stm`` fp32 [L, b, S, D] that were ``written`` to (bool [b])."""
        slots = stm.shape[2]
        for number, layer in enumerate(stm.unbind(0)):  # one at a time: no second copy of the STM
            kept = layer.masked_fill(~written[:, None, None], 0.0)
            self._total[number] += kept.sum(dim=0, dtype=torch.float64)
            norms = torch.linalg.vector_norm(kept, dim=-1)
            self._sums[_ENERGY] += norms.double().square().sum()
            unit = 1.0 / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            together = (unit.unsqueeze(1) @ kept).squeeze(1).double().square().sum()
            pairs = together - (norms * unit).double().square().sum()
            self._sums[_COSINE] += pairs / max(1, slots * (slots - 1)) / stm.shape[0]
        self._sums[_LANES] += written.sum()

    def add_gates(self, sums: torch.Tensor) -> None:
        """Count what :func:`gate_sums` gave."""
        self._sums[_GATE : _GATES + 1] += sums

    def statistics(self) -> dict[str, float | None]:
        """The statistics over all ranks by name; None for one that nothing was counted for. Collective."""
        packed = torch.cat([self._sums, self._total.flatten()])
        sum_over_ranks(packed)
        energy, cosine, lanes, gate, square, gates, of_mean = torch.cat(
            [packed[:6], packed[6:].square().sum().view(1)]
        ).tolist()
        slots = self._total.shape[1]
        values: list[float | None] = [None] * len(MEMORY_STATISTICS)
        if lanes and energy:
            values[0] = math.sqrt(energy / (lanes * self._total.numel()))
            values[1] = max(0.0, 1.0 - of_mean / lanes / energy)
            values[2] = cosine / lanes if slots > 1 else None
        if gates:
            values[3] = gate / gates
            values[4] = math.sqrt(max(0.0, square / gates - (gate / gates) ** 2))
        return dict(zip(MEMORY_STATISTICS, values, strict=True))


def gate_sums(gate: torch.Tensor | None, present: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum, sum of squares and number of the write gate's values over layers, present lanes and slots.

    Args:
        gate: values broadcastable to [L, b, S, 1], None without a gate; present: bool [b].
        shape: [L, b, S, D] of the STM.

    Returns fp64 [3].
    """
    if gate is None:
        return torch.zeros(3, dtype=torch.float64, device=present.device)
    values = gate.detach().double().expand(*shape[:3], 1).masked_fill(~present[:, None, None], 0.0)
    count = present.sum().double() * (shape[0] * shape[2])
    return torch.stack([values.sum(), values.square().sum(), count])
