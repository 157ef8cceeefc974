"""Which world sizes fit a run, checked before any process group exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rxt_dist.config.base import divisors, listed
from rxt_dist.errors import MeshError

if TYPE_CHECKING:
    from rxt_dist.config.run import RunConfig

SUPPORTED_SIZES = {"tensor_size": (1,), "expert_size": (1,)}
"""Values of each field of ``parallel`` that the engine supports."""


def check_world_size(config: RunConfig, world_size: int) -> int:
    """Check that ``config`` can run on ``world_size`` ranks; returns the data-parallel size.

    Raises:
        MeshError: a parallel size is not supported, or the packs of a step cannot be dealt out evenly.
    """
    for field, supported in SUPPORTED_SIZES.items():
        size = getattr(config.parallel, field)
        if size not in supported:
            raise MeshError(f"parallel.{field}: found {size}; valid: {listed(list(supported))}")
    tensor_size, packs = config.parallel.tensor_size, config.batch.packs
    micro = 1 if config.batch.micro_packs == "auto" else config.batch.micro_packs
    valid = [dp * tensor_size for dp in divisors(packs // micro)]
    if world_size not in valid:
        share = f"batch.packs ({packs})" + ("" if micro == 1 else f" / batch.micro_packs ({micro})")
        raise MeshError(
            f"world size: found {world_size} ranks; the data-parallel size must divide {share}, "
            f"valid world sizes: {listed(valid)}"
        )
    return world_size // tensor_size


def micro_packs(config: RunConfig, dp_size: int) -> int:
    """Packs that one rank processes at once, with ``auto`` filled in."""
    micro = config.batch.micro_packs
    return config.batch.packs // dp_size if micro == "auto" else micro


def accumulation_steps(config: RunConfig, dp_size: int) -> int:
    """Micro-batches of one rank in one optimizer step."""
    return config.batch.packs // (dp_size * micro_packs(config, dp_size))
