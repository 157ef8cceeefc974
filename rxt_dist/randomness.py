"""Counter-based randomness: every number is a pure function of its keys.

Nothing here has state, so the numbers cannot depend on rank, world size, micro-batch or packing.
The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014); it runs on NumPy for the data
plan and on torch (CPU or CUDA, the same bits) inside the step.

Shape legend: N keys (one a token or row), C channels.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch

from rxt_dist.kernels.compilation import compiled_kernel

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * _MIX_1 & _WORD
    value = (value ^ (value >> 27)) * _MIX_2 & _WORD
    return value ^ (value >> 31)


def _word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
    return part & _WORD


def derive_key(*parts: int | str) -> int:
    """Fold names and numbers into one 64-bit key, e.g. ``derive_key(seed, "mlm", stage, epoch)``."""
    key = 0
    for part in parts:
        key = _mix((key + _GOLDEN + _word(part)) & _WORD)
    return key


def fold_in(keys: UInt64Array | int, counters: npt.ArrayLike) -> UInt64Array:
    """Derive one key for every counter; ``keys`` and ``counters`` broadcast. Returns uint64."""
    base = np.asarray(keys, dtype=np.uint64)
    with np.errstate(over="ignore"):
        value = base + np.uint64(_GOLDEN) + np.asarray(counters).astype(np.uint64)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return np.asarray(value ^ (value >> np.uint64(31)), dtype=np.uint64)


def uniform(keys: UInt64Array) -> npt.NDArray[np.float64]:
    """Map keys to [0, 1) with 53 random bits."""
    return np.asarray((keys >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def signed_key(value: int) -> int:
    """The int64 with the same 64 bits as an unsigned key, for use with int64 tensors."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def fold_in_tensor(keys: torch.Tensor, counters: torch.Tensor | int) -> torch.Tensor:
    """The torch twin of :func:`fold_in`: int64 tensors hold the same 64 bits."""
    value = keys + signed_key(_GOLDEN) + counters
    value = (value ^ _shift_right(value, 30)) * signed_key(_MIX_1)
    value = (value ^ _shift_right(value, 27)) * signed_key(_MIX_2)
    return value ^ _shift_right(value, 31)


@compiled_kernel
def uniform_tensor(keys: torch.Tensor) -> torch.Tensor:
    """int64 keys of any shape -> float32 in [0, 1) with 24 random bits, same shape."""
    return _shift_right(keys, 40).to(torch.float32) * 2.0**-24


@compiled_kernel
def normal_tensor(keys: torch.Tensor, channels: int) -> torch.Tensor:
    """Standard normal numbers by Box-Muller: int64 keys [...] -> float32 [..., channels]."""
    pairs = (channels + 1) // 2
    counters = torch.arange(pairs, device=keys.device)
    words = fold_in_tensor(keys.unsqueeze(-1), counters)  # [..., pairs]
    radius_bits = _shift_right(words, 32).to(torch.float32)  # 32 bits
    angle_bits = (words & 0xFFFFFFFF).to(torch.float32)
    radius = torch.sqrt(-2.0 * torch.log((radius_bits + 1.0) * 2.0**-32))
    angle = angle_bits * (2.0 * math.pi * 2.0**-32)
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten(-2)[..., :channels]
