"""Fresh short-term memory, drawn by counter so that any mesh draws the same numbers.

Shape legend: L memory layers, B conversations, S STM slots, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.config import ModelConfig
from rxt_dist.kernels.compilation import compiled
from rxt_dist.kernels.triton_support import HAS_TRITON, uses_triton
from rxt_dist.randomness import derive_key, fold_in_tensor, normal_tensor, signed_key, uniform_tensor

if HAS_TRITON:
    from rxt_dist.kernels.random_triton import CONSTANT, NORMAL, UNIFORM, with_draws


def initial_stm(config: ModelConfig, seed: int) -> torch.Tensor:
    """The memory that all conversations of a run with ``seed`` start from where they share one, and that a
    decoder reads which trains alone: fp32 [L, 1, S, D] on the CPU."""
    # Drawn once: not worth what compiling for a CPU costs.
    with torch.compiler.set_stance("force_eager"):
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


def redraw_stm(
    config: ModelConfig, stm: torch.Tensor, where: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """``stm`` [L, B, S, D]; in lanes ``where`` bool [B] what :func:`draw_stm` makes of ``keys`` int64 [B]."""
    if uses_triton(stm) and stm.numel():
        out: torch.Tensor = _Redraw.apply(stm, where, keys, config)  # type: ignore[no-untyped-call]
        return out
    return _with_fresh(stm, where, keys, config)


class _Redraw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stm: torch.Tensor, where: torch.Tensor, keys: torch.Tensor, config: ModelConfig
    ) -> torch.Tensor:
        init = config.stm_init
        kinds = {"zeros": (CONSTANT, 0.0), "ones": (CONSTANT, 1.0), "standard": (NORMAL, 1.0)}
        kinds |= {"normal": (NORMAL, init.scale), "uniform": (UNIFORM, init.scale)}
        ctx.save_for_backward(where)
        return with_draws(stm.contiguous(), where, keys, *kinds[init.distribution])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (where,) = ctx.saved_tensors
        return grads[0].masked_fill(where.view(1, -1, 1, 1), 0.0), None, None, None


@compiled
def _with_fresh(
    stm: torch.Tensor, where: torch.Tensor, keys: torch.Tensor, config: ModelConfig
) -> torch.Tensor:
    """Nothing of the draws of other lanes is kept."""
    return torch.where(where.view(1, -1, 1, 1), draw_stm(config, keys).to(stm), stm)
