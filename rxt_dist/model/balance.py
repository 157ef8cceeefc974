"""What keeps the experts of a layer in use: losses of its router, and updates of its selection bias.

Every loss is a sum over tokens, linear in each of them, so that it does not depend on how a step is divided.
The Switch loss multiplies two means over tokens; of these the shares of tokens are constants, taken from the
step before.

Shape legend: N tokens, E experts, M mixture-of-experts layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton

if HAS_TRITON:
    from rxt_dist.kernels.order_triton import count_keys


class RouterSums(NamedTuple):
    """Losses of one router, as fp32 scalars summed over the tokens of a pass; None: not configured."""

    balance: torch.Tensor | None
    z: torch.Tensor | None


def switch_loss(probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss of the Switch Transformer (https://arxiv.org/abs/2101.03961, eq. 4-6), summed over
    tokens: ``E * sum_e shares_e * probabilities_te``, 1 for each token when either is even.

    Args:
        probabilities: fp32 [N, E]; shares: fp32 [E], of all choices those of each expert, summing to 1; no
            gradient flows to them.
    """
    return torch.dot(probabilities.sum(dim=0), shares.to(probabilities)) * shares.shape[0]


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Router z-loss (https://arxiv.org/abs/2202.08906, eq. 5), summed over tokens: the square of
    ``log sum_e exp(logits_te)``. ``logits`` [N, E] of any precision; computed in fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.logsumexp(wide, dim=-1).square().sum()


def count_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert was chosen: int64 [E], of expert numbers int64 of any shape. No host sync."""
    flat = experts.flatten()
    if uses_triton(flat):
        ends = count_keys(flat, num_experts)
        return ends.long().diff(prepend=ends.new_zeros(1))
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def load_shares(loads: torch.Tensor) -> torch.Tensor:
    """Shares of the experts in all choices: fp32 [..., E], of int64 [..., E] counts; 0 without any."""
    return (loads.double() / loads.sum(dim=-1, keepdim=True).clamp_min(1)).float()


def bias_direction(loads: torch.Tensor) -> torch.Tensor:
    """Where the selection biases go (https://arxiv.org/abs/2408.15664): sign of mean load less load.

    int64 counts [..., E] -> -1, 0 or 1, exactly: the same on every mesh.
    """
    return torch.sign(loads.sum(dim=-1, keepdim=True) - loads * loads.shape[-1])
