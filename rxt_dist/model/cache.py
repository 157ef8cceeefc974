"""Keys and values that a decoder keeps while it generates.

Shape legend: B sequences, N tokens of one pass, C rows of room for each sequence, Hk key/value heads,
d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.model.layout import SequenceLayout


class KeysValues(NamedTuple):
    """Keys and values of one attention, [rows, Hk, d] each."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Pass:
    """Where the rows of one pass go.

    Attributes:
        rows: int64 [N], places in the flattened [B, C]; sequences: B; room: C.
        visible: rows that the pass reads: None for only its own (nothing came before), else a prefix of the
            flattened [B, C] that holds all of them.
    """

    rows: torch.Tensor
    sequences: int
    room: int
    visible: int | None


class LayerCache:
    """Keys and values of one layer: [B, C, Hk, d], of which each sequence fills the first rows."""

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache
        self._stored: KeysValues | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """Store the rows [N, Hk, d] of the pass that began; returns the rows that its layout speaks of."""
        plan = self._cache.plan
        old_keys, old_values = self._stored or (None, None)
        self._stored = KeysValues(_write(old_keys, keys, plan), _write(old_values, values, plan))
        if plan.visible is None:
            return KeysValues(keys, values)
        return KeysValues(*(x.flatten(0, 1)[: plan.visible] for x in self._stored))

    def keep(self, sequences: torch.Tensor) -> None:
        """Forget all but the given ones, int64 [B']."""
        if self._stored is not None:
            self._stored = KeysValues(*(x.index_select(0, sequences) for x in self._stored))


def _write(stored: torch.Tensor | None, rows: torch.Tensor, plan: _Pass) -> torch.Tensor:
    """``rows`` in their places of ``stored``, which grows to the room that the pass needs."""
    if stored is None or stored.shape[1] < plan.room:
        grown = rows.new_empty(plan.sequences, plan.room, *rows.shape[1:])
        if stored is not None:
            grown[:, : stored.shape[1]] = stored
        stored = grown
    stored.flatten(0, 1).index_copy_(0, plan.rows, rows)
    return stored


class KeyValueCache:
    """Self-attention keys and values of B growing sequences, for all layers of a decoder.

    A pass of the decoder over the next tokens of every sequence is announced with :meth:`begin`; each layer
    then appends its rows. Only rows that were appended are ever read. Nothing here waits for the device.
    """

    def __init__(self, layers: int, sequences: int, device: torch.device) -> None:
        self.lengths = [0] * sequences
        """Tokens of every sequence so far."""
        self.layers = [LayerCache(self) for _ in range(layers)]
        self.plan: _Pass
        self._room = 0
        self._ends = torch.zeros(sequences, dtype=torch.int64, device=device)  # ``lengths`` on the device

    def begin(self, layout: SequenceLayout, added: Sequence[int]) -> SequenceLayout:
        """Make room for a pass over ``added`` new tokens of each sequence, which ``layout`` lays out.

        Returns the same layout with the tokens' positions in their whole sequences, and with attention to
        all that these hold.
        """
        first, sequences = not any(self.lengths), len(self.lengths)
        starts = self._ends
        self._ends = starts + layout.cu_seqlens.diff()
        self.lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]
        longest = max(self.lengths)
        if longest > self._room:
            self._room = max(longest, 2 * self._room)
        positions = layout.positions + starts[layout.sequence_ids]
        rows = layout.sequence_ids * self._room + positions
        if first:
            self.plan = _Pass(rows, sequences, self._room, None)
            return layout
        cu_k = F.pad(self._ends.cumsum(0), (1, 0))
        index, visible = None, longest
        if sequences > 1:
            visible = sequences * self._room
            row = torch.arange(sum(self.lengths), device=cu_k.device)
            sequence = torch.searchsorted(cu_k[1:], row, right=True)
            index = sequence * self._room + row - cu_k[sequence]
        self.plan = _Pass(rows, sequences, self._room, visible)
        attention = AttentionLayout(
            layout.cu_seqlens, cu_k.to(torch.int32), layout.max_seqlen, longest, key_index=index
        )
        return replace(layout, positions=positions, attention=attention)

    def keep(self, sequences: Sequence[int], index: torch.Tensor) -> None:
        """Forget all sequences but these numbers; ``index`` holds the same, int64 on the device."""
        self.lengths = [self.lengths[sequence] for sequence in sequences]
        self._ends = self._ends[index]
        for layer in self.layers:
            layer.keep(index)
