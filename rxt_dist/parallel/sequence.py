"""Components whose tokens tensor-parallel ranks divide between products (sequence parallelism).

From the embedding to the end of the last layer each rank has the residual stream of its slice of the tokens:
it norms, routes and adds what is in it. Products gather all tokens, and their sums are scattered again (see
:mod:`rxt_dist.parallel.regions`). The decoder divides the memory that it reads in the same way. What comes
out is joined: heads, losses and what stages do with encoded tokens see all rows on every rank.

Shape legend: L layers, N tokens of a pass, n of this rank's slice, D embedding width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rxt_dist.model.decoder import Decoder, DecoderOutput
from rxt_dist.model.encoder import Encoder
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.memory import Memory
from rxt_dist.model.memory_attention import MemoryAttention
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.regions import join_slices, leave_parts, take_slice
from rxt_dist.parallel.stand_in import take_over
from rxt_dist.parallel.tensor_layers import TensorRank

_NORMS = ("attention_norm", "cross_norm", "stm_norm", "feed_forward_norm", "head_norm")


class SlicedEncoder(Encoder):
    """``whole``, whose layers divide the tokens; stands where it stood. The result [L, N, D] is joined."""

    def __init__(self, whole: Encoder, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._tensor = tensor

    def partial_parameters(self) -> list[str]:
        """Each rank's norms see its slice."""
        return _norm_parameters(self)

    def forward(self, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        own = torch.stack(super().outputs(tokens, *arguments), dim=1)  # [n, L, D]
        return join_slices(own, tokens.shape[0], self._tensor.ranks).transpose(0, 1)

    def outputs(self, tokens: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
        return list(self.forward(tokens, *arguments).unbind(0))


class SlicedDecoder(Decoder):
    """``whole``, whose layers divide the tokens; stands where it stood. The results are joined."""

    def __init__(self, whole: Decoder, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._tensor = tensor
        self._has_experts = any(isinstance(part, MoE) for part in whole.modules())

    def partial_parameters(self) -> list[str]:
        """Each rank's norms see its slice."""
        return _norm_parameters(self)

    def forward(
        self, tokens: torch.Tensor, layout: SequenceLayout, memory: Memory | None, cache: Any = None
    ) -> DecoderOutput:
        if memory is not None:
            states = memory.states
            if isinstance(states, torch.Tensor):
                memory = replace(memory, states=_divide(states, self._tensor))
            else:
                layers = [rows[None] for rows in states if isinstance(rows, torch.Tensor)]
                memory = replace(memory, states=[_divide(rows, self._tensor)[0] for rows in layers])
        own = super().forward(tokens, layout, memory, cache)
        group = self._tensor.ranks
        output = replace(own, hidden=join_slices(own.hidden, tokens.shape[0], group))
        if self._has_experts:
            aux_sum, z_sum = leave_parts(torch.stack([own.aux_sum, own.z_sum]), group)
            output = replace(output, aux_sum=aux_sum, z_sum=z_sum)
        return output


class SlicedMemoryAttention(MemoryAttention):
    """``whole``, whose slots read encoded tokens that ranks divide; stands where it stood.

    The slots themselves are whole on every rank: they are the carried state of lanes, and few of what is
    computed with them is kept.
    """

    def __init__(self, whole: MemoryAttention, tensor: TensorRank) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._tensor = tensor

    def partial_parameters(self) -> list[str]:
        """The norm of the tokens sees a slice of them."""
        return [] if self.input_norm is None else ["input_norm.weight"]

    def _sources(self, encoded: torch.Tensor) -> torch.Tensor:
        return super()._sources(_divide(encoded, self._tensor))


def _divide(layers: torch.Tensor, tensor: TensorRank) -> torch.Tensor:
    """This rank's slice [L, n, D] of rows [L, N, D] that are read next."""
    assert tensor.sliced is not None
    tensor.sliced.read = layers.shape[1]
    return take_slice(layers.transpose(0, 1), tensor.ranks).transpose(0, 1).contiguous()


def _norm_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of those norms in ``module`` that see divided rows."""
    names = [name for name, _ in module.named_parameters()]
    return [name for name in names if name.split(".")[-2] in _NORMS]
