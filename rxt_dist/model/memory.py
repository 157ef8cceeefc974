"""What the decoder reads through memory cross-attention.

Shape legend: L decoder memory layers, N tokens, D embedding width, B sequences or lanes, S STM slots,
M memory rows of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.model.layout import SequenceLayout


@dataclass(frozen=True, eq=False)
class Memory:
    """Memory rows for every decoder layer, and which tokens read which rows.

    Attributes:
        states: [L, M, D].
        layout: query rows are the decoder's tokens, key rows the M memory rows.
    """

    states: torch.Tensor
    layout: AttentionLayout

    @classmethod
    def of_sequence(cls, layers: torch.Tensor, layout: SequenceLayout) -> Memory:
        """Each sequence reads its own encoder outputs ``layers`` [L, N, D], all of its positions."""
        cu = layout.cu_seqlens
        return cls(layers, AttentionLayout(cu, cu, layout.max_seqlen, layout.max_seqlen))

    @classmethod
    def of_stm(cls, stm: torch.Tensor, layout: SequenceLayout) -> Memory:
        """Sequence b reads lane b of the short-term memory ``stm`` [L, B, S, D].

        With a single lane all sequences read it: they become one query group, so nothing is expanded.
        """
        lanes, slots = stm.shape[1], stm.shape[2]
        device = layout.cu_seqlens.device
        cu_k = torch.arange(lanes + 1, dtype=torch.int32, device=device) * slots
        if lanes == 1:
            cu_q = torch.arange(2, dtype=torch.int32, device=device) * layout.num_tokens
            attention = AttentionLayout(cu_q, cu_k, layout.num_tokens, slots)
        else:
            attention = AttentionLayout(layout.cu_seqlens, cu_k, layout.max_seqlen, slots)
        return cls(stm.flatten(1, 2), attention)
