"""What a device can do at most, from its manufacturer's data sheet."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
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


def measured_rates(device: torch.device) -> Rates:
    """Rates of a large copy and of square matrix products, for a device without a data sheet here."""
    source = torch.ones(1 << 24, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(512, 512, device=device, dtype=dtype)
        matmul[dtype] = 2 * 512**3 / _best_seconds(lambda square=square: square @ square, device)
    return Rates(matmul, 2 * source.numel() * source.element_size() / seconds)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of some calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
