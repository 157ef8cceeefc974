"""Where the sequences of a pack lie in the flat token axis.

Shape legend: N tokens of all sequences, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from rxt_dist.kernels.attention import AttentionLayout


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """B sequences laid end to end, without padding.

    Attributes:
        cu_seqlens: int32 [B+1]; sequence b holds tokens ``cu_seqlens[b]:cu_seqlens[b+1]``.
        max_seqlen: length of the longest sequence.
        positions: int64 [N], position of each token in its sequence, from 0.
        sequence_ids: int64 [N], the sequence of each token.
        attention: who attends to whom in self-attention; None means each sequence to all of itself.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    positions: torch.Tensor
    sequence_ids: torch.Tensor
    attention: AttentionLayout | None = None

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | npt.NDArray[np.integer], device: torch.device | str = "cpu"
    ) -> SequenceLayout:
        """The layout of sequences of the given lengths (zero allowed), built on the host."""
        sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
        boundaries = np.zeros(sizes.size + 1, dtype=np.int64)
        np.cumsum(sizes, out=boundaries[1:])
        ids = np.repeat(np.arange(sizes.size, dtype=np.int64), sizes)
        positions = np.arange(boundaries[-1], dtype=np.int64) - boundaries[ids]
        return cls(
            cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)).to(device),
            max_seqlen=int(sizes.max(initial=0)),
            positions=torch.from_numpy(positions).to(device),
            sequence_ids=torch.from_numpy(ids).to(device),
        )

    @classmethod
    def side_by_side(cls, layouts: Sequence[SequenceLayout]) -> SequenceLayout:
        """The layout of all sequences of ``layouts``, in order, each of which attends to all of itself."""
        if len(layouts) == 1:
            return layouts[0]
        cu_seqlens, ids, tokens, sequences = [layouts[0].cu_seqlens[:1]], [], 0, 0
        for one in layouts:
            cu_seqlens.append(one.cu_seqlens[1:] + tokens)
            ids.append(one.sequence_ids + sequences)
            tokens, sequences = tokens + one.num_tokens, sequences + one.num_sequences
        return cls(
            cu_seqlens=torch.cat(cu_seqlens),
            max_seqlen=max(one.max_seqlen for one in layouts),
            positions=torch.cat([one.positions for one in layouts]),
            sequence_ids=torch.cat(ids),
        )

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @cached_property
    def self_attention(self) -> AttentionLayout:
        """The groups of self-attention: one object for all layers, so that its indices are built once."""
        if self.attention is not None:
            return self.attention
        return AttentionLayout(self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceLayout:
        """A copy on ``device``."""
        return SequenceLayout(
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            max_seqlen=self.max_seqlen,
            positions=self.positions.to(device, non_blocking=non_blocking),
            sequence_ids=self.sequence_ids.to(device, non_blocking=non_blocking),
            attention=None if self.attention is None else self.attention.to(device, non_blocking),
        )

    def pin_memory(self) -> SequenceLayout:
        """A copy in page-locked host memory, from which :meth:`to` can copy asynchronously."""
        return SequenceLayout(
            cu_seqlens=self.cu_seqlens.pin_memory(),
            max_seqlen=self.max_seqlen,
            positions=self.positions.pin_memory(),
            sequence_ids=self.sequence_ids.pin_memory(),
        )
