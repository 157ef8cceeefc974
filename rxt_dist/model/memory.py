"""What the decoder reads through memory cross-attention.

Shape legend: L decoder memory layers, N tokens, D embedding width, B sequences or lanes, S STM slots,
M memory rows of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.model.cache import KeysValues
from rxt_dist.model.layout import SequenceLayout


@dataclass(frozen=True, eq=False)
class Memory:
    """Memory rows for every decoder layer, and which tokens read which rows.

    Attributes:
        states: [L, M, D], in one tensor or layer by layer, or the keys and values that every layer made.
        layout: query rows are the decoder's tokens, key rows the M memory rows.
    """

    states: torch.Tensor | Sequence[torch.Tensor] | Sequence[KeysValues]
    layout: AttentionLayout

    @classmethod
    def of_sequence(cls, layers: torch.Tensor | Sequence[torch.Tensor], layout: SequenceLayout) -> Memory:
        """Each sequence reads its own encoder outputs ``layers`` [L, N, D], all of its positions."""
        cu = layout.cu_seqlens
        return cls(layers, AttentionLayout(cu, cu, layout.max_seqlen, layout.max_seqlen))

    @classmethod
    def of_stm(cls, stm: torch.Tensor, layout: SequenceLayout) -> Memory:
        """Sequence b reads lane b of the short-term memory ``stm`` [L, B, S, D].

        With a single lane all sequences read it: they become one query group, so nothing is expanded.

        Raises:
            ValueError: there are several lanes, and another number of sequences.
        """
        return cls(stm.flatten(1, 2), stm_groups(stm.shape[1], stm.shape[2], layout))

    def of_layers(self) -> Sequence[torch.Tensor | KeysValues]:
        """``states``, layer by layer.

        All at once: taken one by one, the gradient of each layer would be as large as that of all of them.
        """
        return self.states.unbind(0) if isinstance(self.states, torch.Tensor) else self.states

    def up_to_position(self, layout: SequenceLayout) -> AttentionLayout:
        """Who reads what where the token at position t sees the rows 0 to t of its memory alone.

        To be used with causal attention. Sequences read either rows of their own, one for each of their
        tokens, or memories of equal size. ``layout`` may continue sequences at later positions.
        """
        if self.layout.cu_k is self.layout.cu_q:
            return self.layout
        lanes, slots = self.layout.cu_k.shape[0] - 1, self.layout.max_k
        key = f"_rows_up_to_position_{lanes}_{slots}"
        found: AttentionLayout | None = vars(layout).get(key)
        if found is None:
            found = vars(layout)[key] = _rows_up_to_position(layout, lanes, slots)
        return found


def stm_groups(lanes: int, slots: int, layout: SequenceLayout) -> AttentionLayout:
    """Which rows of ``lanes`` memories of ``slots`` rows each sequence of ``layout`` reads: those of its own
    lane, or of the only one."""
    if lanes not in (1, layout.num_sequences):
        raise ValueError(f"stm: found {lanes} lanes; expected 1 or {layout.num_sequences}")
    device = layout.cu_seqlens.device
    cu_k = torch.arange(lanes + 1, dtype=torch.int32, device=device) * slots
    if lanes == 1:
        cu_q = torch.arange(2, dtype=torch.int32, device=device) * layout.num_tokens
        return AttentionLayout(cu_q, cu_k, layout.num_tokens, slots)
    return AttentionLayout(layout.cu_seqlens, cu_k, layout.max_seqlen, slots)


def _rows_up_to_position(layout: SequenceLayout, lanes: int, slots: int) -> AttentionLayout:
    first_row = layout.sequence_ids * (slots if lanes > 1 else 0)
    if layout.attention is None and layout.max_seqlen <= slots:
        # As many rows as tokens: row t for the token at position t.
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        return AttentionLayout(cu, cu, longest, longest, first_row + layout.positions)
    # Causal attention lets the last query of a group see all its keys and each earlier one a key fewer. So
    # tokens behind the last row, which see all rows, are groups of their own; to find them the host waits.
    alone = layout.positions >= slots
    new_sequence = F.pad(layout.sequence_ids.diff(), (1, 0), value=1) != 0
    starts = (alone | new_sequence).nonzero()[:, 0]
    cu_q = F.pad(starts, (0, 1), value=layout.num_tokens)
    keys = (layout.positions[cu_q[1:] - 1] + 1).clamp_max(slots)
    cu_k = F.pad(keys.cumsum(0), (1, 0))
    group = torch.repeat_interleave(keys)
    key_index = first_row[starts][group] + torch.arange(group.shape[0], device=group.device) - cu_k[group]
    longest = min(layout.max_seqlen, slots)
    return AttentionLayout(cu_q.to(torch.int32), cu_k.to(torch.int32), longest, slots, key_index)
