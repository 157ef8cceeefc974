"""How evenly tokens fall on the experts, over all ranks.

Shape legend: M mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rxt_dist.model.moe import MoE
from rxt_dist.parallel.collectives import sum_over_ranks

EXPERT_STATISTICS = ("expert_load_entropy", "expert_load_max", "dead_experts")
BIAS_SPAN = "expert_bias_span"


def _layers(module: nn.Module) -> list[MoE]:
    return [part for part in module.modules() if isinstance(part, MoE)]


def count_loads(module: nn.Module, device: torch.device | None) -> None:
    """From now on count the tokens of every expert in ``module``, on ``device``; None: stop it."""
    for layer in _layers(module):
        experts = layer.config.num_experts
        layer.loads = None if device is None else torch.zeros(experts, dtype=torch.int64, device=device)


@contextmanager
def not_counted(module: nn.Module) -> Iterator[None]:
    """Inside, tokens are not counted: they are computed a second time."""
    layers = _layers(module)
    loads = [layer.loads for layer in layers]
    for layer in layers:
        layer.loads = None
    try:
        yield
    finally:  # recomputation stops early by an exception
        for layer, load in zip(layers, loads, strict=True):
            layer.loads = load


def load_statistics(module: nn.Module) -> dict[str, float | None]:
    """What was counted in ``module`` on all ranks; empty without experts. Collective.

    ``expert_load_entropy``: entropy of the shares of tokens over log E, mean of the layers (1: even).
    ``expert_load_max``: tokens of the busiest expert over the mean, worst layer. ``dead_experts``: experts
    without a token, all layers together. ``expert_bias_span``, with selection biases only: the largest less
    the smallest, worst layer.
    """
    layers = _layers(module)
    counted = [layer.loads for layer in layers if layer.loads is not None]
    if not counted:
        return {}
    loads = sum_over_ranks(torch.stack(counted)).double()  # [M, E]
    experts = loads.shape[1]
    shares = loads / loads.sum(dim=1, keepdim=True).clamp_min(1)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1).mean()
    entropy = entropy / math.log(experts) if experts > 1 else torch.ones_like(entropy)
    names, found = list(EXPERT_STATISTICS), [entropy, shares.max() * experts, (loads == 0).sum().double()]
    biases = [layer.router.selection_bias for layer in layers if layer.router.selection_bias is not None]
    if biases:
        bias = torch.stack(biases).double()
        names.append(BIAS_SPAN)
        found.append((bias.amax(dim=1) - bias.amin(dim=1)).max())
    return dict(zip(names, torch.stack(found).tolist(), strict=True))
