"""Sums over the ranks of a run that also make sense in a process without a group."""

from __future__ import annotations

import torch
import torch.distributed as dist

_data_group: dist.ProcessGroup | None = None


def set_data_group(group: dist.ProcessGroup | None) -> None:
    """Choose for this process over which ranks :func:`sum_over_ranks` adds; None: all of them."""
    global _data_group
    _data_group = group


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add ``values`` up over the data-parallel ranks in place and return it.

    Ranks that share tensors have the same values, which count once. A process by itself is the only rank.
    """
    if dist.is_initialized():
        dist.all_reduce(values, group=_data_group)
    return values
