"""Where kernels written in Triton run: on CUDA devices. Elsewhere PyTorch's operators compute the same."""

from __future__ import annotations

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)

interpreted = False
"""Set by tests, to run the kernels on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""


def uses_triton(x: torch.Tensor) -> bool:
    """Whether Triton kernels work on tensors like ``x``."""
    return HAS_TRITON and x.dtype in _TYPES and (x.is_cuda or interpreted)
