"""Canonical tensors: what a fused parameter is made of.

Modules fuse projections that read the same input. Checkpoints and initial values speak of the unfused
tensors, because rows of a fused tensor cut over ranks would belong to different projections.
"""

from __future__ import annotations

import torch
from torch import nn


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of ``module`` by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def canonical_map(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """For every parameter of ``model``: the canonical tensors it holds, in order along dimension 0.

    Returns:
        Parameter name -> [(canonical name, size along dimension 0)]; the sizes add up to the parameter's.
    """
    parts: dict[str, list[tuple[str, int]]] = {}
    for prefix, module in model.named_modules():
        split = getattr(module, "canonical_parts", None)
        dot = f"{prefix}." if prefix else ""
        for name, pieces in ({} if split is None else split()).items():
            parts[dot + name] = [(dot + piece, size) for piece, size in pieces]
    return {
        name: parts.get(name, [(name, parameter.shape[0] if parameter.dim() else 1)])
        for name, parameter in model.named_parameters()
    }
