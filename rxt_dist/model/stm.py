"""Fresh short-term memory, drawn by counter so that any mesh draws the same numbers.

Shape legend: L memory layers, B conversations, S STM slots, D embedding width.
"""

from __future__ import annotations

import torch

from rxt_dist.config import ModelConfig
from rxt_dist.randomness import derive_key, fold_in_tensor, normal_tensor, signed_key, uniform_tensor


def initial_stm(config: ModelConfig, seed: int) -> torch.Tensor:
    """The memory that all conversations of a run with ``seed`` start from where they share one, and that a
    decoder reads which trains alone: fp32 [L, 1, S, D] on the CPU."""
    return draw_stm(config, torch.tensor([signed_key(derive_key(seed, "stm"))]))


def draw_stm(config: ModelConfig, keys: torch.Tensor) -> torch.Tensor:
    """Initial memory of B conversations from their int64 keys [B]: fp32 [L, B, S, D].

    Every conversation, layer and slot gets its own draw; equal keys give equal memories.
    """
    init = config.stm_init
    layers, slots, width = config.decoder.num_layers, config.stm_size, config.embed_dim
    shape = (layers, keys.shape[0], slots, width)
    if init.distribution in ("zeros", "ones"):
        return torch.full(shape, float(init.distribution == "ones"), device=keys.device)
    rows = torch.arange(layers * slots, device=keys.device).view(layers, 1, slots)
    row_keys = fold_in_tensor(keys.view(1, -1, 1), rows)
    if init.distribution == "uniform":
        columns = torch.arange(width, device=keys.device)
        return uniform_tensor(fold_in_tensor(row_keys.unsqueeze(-1), columns)) * init.scale
    normal = normal_tensor(row_keys, width)
    return normal if init.distribution == "standard" else normal * init.scale
