"""What a device can do at most, from its manufacturer's data sheet."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """Operations a second of dense matrix products by dtype, and bytes a second of the device's memory."""

    matmul: dict[torch.dtype, float]
    memory: float


def _rates(bf16: float, fp32: float, memory: float) -> Rates:
    return Rates({torch.bfloat16: bf16, torch.float32: fp32}, memory)


# NVIDIA's data sheets: dense, without sparsity, fp32 without TF32.
_RATED = {
    "NVIDIA H100 80GB HBM3": _rates(989.4e12, 66.9e12, 3.35e12),
    "NVIDIA H100 PCIe": _rates(756e12, 51.2e12, 2.0e12),
    "NVIDIA H100 NVL": _rates(835e12, 60e12, 3.9e12),
    "NVIDIA H200": _rates(989.4e12, 66.9e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": _rates(312e12, 19.5e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": _rates(312e12, 19.5e12, 1.555e12),
}


def device_name(device: torch.device) -> str:
    """How the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''} a rank"


def rated(device: torch.device) -> Rates | None:
    """The data sheet's rates; None for a device that is not listed."""
    return _RATED.get(device_name(device))
