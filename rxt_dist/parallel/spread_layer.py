"""A decoder whose experts are spread over ranks, and its layers.

A layer is compiled in two regions with the messages between them.

Shape legend: N tokens, D embedding width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from rxt_dist.kernels.compilation import compiled
from rxt_dist.model.balance import RouterSums
from rxt_dist.model.decoder import Decoder, DecoderOutput
from rxt_dist.model.layer import Layer
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.experts import Departure, ExpertParallel
from rxt_dist.parallel.rooms import Trial
from rxt_dist.parallel.stand_in import take_over


class SpreadDecoder(Decoder):
    """``whole``, in whose layers rows of experts get room before they are counted; stands where it stood.

    In training, where all ranks make the same passes, the host asks at the end of one whether there was room
    enough, and not in every layer: it gives the device work for a whole pass ahead.
    """

    def __init__(self, whole: Decoder, trial: Trial) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)
        self._trial = trial
        self._mixtures = [part for part in whole.modules() if isinstance(part, MoE)]

    def forward(self, *args: Any, **kwargs: Any) -> DecoderOutput:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        loads = [part.loads for part in self._mixtures if part.loads is not None]
        before = [one.clone() for one in loads]

        def undo() -> None:
            for one, value in zip(loads, before, strict=True):
                one.copy_(value)

        return self._trial.run(lambda: super(SpreadDecoder, self).forward(*args, **kwargs), undo)


class SpreadLayer(Layer):
    """``whole``, whose feed-forward has spread experts; stands where it stood, and is called alike.

    Messages cannot be compiled. Were they in the middle of a region, each of the functions that lead to them
    would become regions of its own, and the host, which enters a region in the time of many operations, the
    limit of a step.
    """

    def __init__(self, whole: Layer) -> None:
        nn.Module.__init__(self)
        take_over(self, whole)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, RouterSums | None]:
        moe = cast(MoE, self.feed_forward)
        x, shared, losses, visitors, weights, leaving = self._before(*args, **kwargs)
        routed = cast(ExpertParallel, moe.experts).travel(visitors, weights, leaving)
        routed = moe.collect(routed, x.shape[0])
        if shared is None and moe.output_bias is None:
            return x + routed, losses  # no region for one operation
        return self._after(x, routed, shared), losses

    @compiled
    def _before(
        self, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, RouterSums, torch.Tensor, torch.Tensor, Departure]:
        """The residual stream [N, D], what shared experts make of it, losses, and what travels."""
        moe = cast(MoE, self.feed_forward)
        x, normed = self.attend(*args, **kwargs)
        routing = moe.route(normed)
        shared, losses = moe.beside(normed, routing)
        visitors, chosen, weights = moe.deal(normed, routing)
        leaving = cast(ExpertParallel, moe.experts).depart(chosen, weights.detach(), active=True)
        return x, shared, losses, visitors, weights, leaving

    @compiled
    def _after(self, x: torch.Tensor, routed: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        return x + cast(MoE, self.feed_forward).join(routed, shared)
