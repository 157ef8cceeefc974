"""What the balance of experts carries from step to step: loads over all ranks, and what follows from them.

Shape legend: M mixture-of-experts layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rxt_dist.model.balance import bias_direction, load_shares
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.collectives import sum_over_ranks


class ExpertBalance:
    """Counts the tokens of every expert over a whole optimizer step, then moves selection biases and sets the
    shares that the switch loss takes in the next step.

    Both see the step of all ranks, micro-batches and windows, and are therefore the same on every mesh. The
    host never waits for the device.

    Args:
        layers: the layers of a stage by their names in the model, on the device where they train.
    """

    def __init__(self, layers: Mapping[str, MoE]) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.config.needs_loads}
        self._shares: dict[str, torch.Tensor] = {}
        for name, layer in self._layers.items():
            if layer.config.aux_loss == "switch":
                experts, device = layer.config.num_experts, layer.router.proj.weight.device
                # Even until a step has been counted: the loss is constant then.
                self._shares[name] = torch.full((experts,), 1.0 / experts, device=device)
                layer.shares = self._shares[name]

    def begin_step(self) -> None:
        """Count from zero."""
        for layer in self._layers.values():
            device = layer.router.proj.weight.device
            layer.loads = torch.zeros(layer.config.num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def end_step(self) -> None:
        """Take over what was counted. Collective where a layer needs it."""
        loads = [layer.loads for layer in self._layers.values() if layer.loads is not None]
        if not loads:
            return
        totals = sum_over_ranks(torch.stack(loads))  # [M, E]
        shares, directions = load_shares(totals), bias_direction(totals)
        for row, (name, layer) in enumerate(self._layers.items()):
            bias, rate = layer.router.selection_bias, layer.config.bias_update_rate
            if bias is not None and rate:
                bias.add_(directions[row].to(bias.dtype), alpha=rate)
            if name in self._shares:
                self._shares[name].copy_(shares[row])

    def shares(self) -> dict[str, torch.Tensor]:
        """fp32 [E] by layer, what the switch loss takes in the next step; writing into them changes it."""
        return self._shares
