"""What PyTorch's symmetric memory does between GPUs, between processes on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rxt_dist.parallel import expert_messages, peers


class Handle:
    """Of memory in a file of every rank."""

    def __init__(self, files: list[Path], size: int, group: dist.ProcessGroup) -> None:
        self._group = group
        self._memories = [
            torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8) for file in files
        ]

    def get_buffer(self, rank: int, shape: list[int], dtype: torch.dtype, start: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return self._memories[rank].view(dtype)[start : start + count].view(shape)

    def barrier(self, channel: int, timeout: int) -> None:
        dist.barrier(group=self._group)


class Stream:
    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: None) -> None: ...

    def record_event(self) -> None: ...


def share_memory(patch: pytest.MonkeyPatch, folder: Path) -> list[int]:
    """Have :mod:`rxt_dist.parallel.peers` run here; sizes of the memory that it takes are in the list."""
    taken: list[int] = []

    def symmetric(
        size: int, group: dist.ProcessGroup, hosts: dist.ProcessGroup, device: torch.device
    ) -> tuple[torch.Tensor, Handle]:
        files = [folder / f"memory-{rank}-{len(taken)}" for rank in range(group.size())]
        taken.append(size)
        if group.rank() == 0:
            for file in files:
                file.write_bytes(b"\xff" * size)
        dist.barrier(group=group)
        return torch.empty(0), Handle(files, size, group)

    patch.setattr(peers, "_symmetric", symmetric)
    patch.setattr(expert_messages, "can_write", lambda device, hosts: True)
    patch.setattr(torch.cuda, "synchronize", lambda device: None)
    patch.setattr(torch.cuda, "Stream", lambda *options, **more: Stream())
    patch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return taken
