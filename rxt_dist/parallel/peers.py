"""Messages between GPUs of one host, brought by their copy engines.

A message of NCCL takes multiprocessors, and products that begin meanwhile wait for them. Here a rank writes
into memory of the others, which PyTorch's symmetric memory has made known to it; then all tell each other
that they have written, which takes one small kernel.

There is one place for each kind of message. It may be written again as soon as whoever reads it has sent an
answer, so that messages have to come in turn: choices and tokens there, sums back; in the backward pass
gradients of sums there, gradients of tokens and weights back.

Shape legend: R ranks of a group.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

logger = logging.getLogger(__name__)

Kind = Literal["choices", "tokens", "sums", "grad_sums", "grad_tokens", "grad_weights"]
_OF_TOKENS: tuple[Kind, ...] = ("tokens", "sums", "grad_sums", "grad_tokens")
_OF_CHOICES: tuple[Kind, ...] = ("choices", "grad_weights")
_ALIGNMENT = 256
_GROWTH = 1.25

_enabled = False


def set_peer_copies(enabled: bool) -> None:
    """Whether groups that are opened from now on may write into each other's memory."""
    global _enabled
    _enabled = enabled


@dataclass(frozen=True, eq=False)
class Message:
    """Rows on their way: ``rows`` are there when :meth:`arrived` returns them."""

    rows: torch.Tensor
    wait: Callable[[], object]

    def arrived(self) -> torch.Tensor:
        self.wait()
        return self.rows


def can_write(device: torch.device, hosts: dist.ProcessGroup) -> bool:
    """Whether the ranks of a group may write into each other's memory, and have GPUs of one host. Collective
    over ``hosts``, the same ranks' group for tensors of the host."""
    if not _enabled:
        return False
    names: list[Any] = [None] * hosts.size()
    own = (socket.gethostname(), device.type)
    dist.all_gather_object(names, own, group=hosts)
    found = set(names) == {(own[0], "cuda")}
    if not found:
        logger.warning("runtime.peer_copies: NCCL brings tokens to experts, as their ranks share no host")
    return found


class Peers:
    """Memory of the ranks of a group on one host, into which they write each other's messages.

    Args:
        group: of CUDA devices; hosts: the same ranks, for tensors of the host.
        rows: most that a rank gets in one message; token_bytes, choice_bytes: size of a row.

    Raises:
        RuntimeError: the devices cannot reach each other. On every rank, if on one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        hosts: dist.ProcessGroup,
        device: torch.device,
        rows: int,
        token_bytes: int,
        choice_bytes: int,
    ) -> None:
        self.rows, self.sizes = int(rows * _GROWTH), (token_bytes, choice_bytes)
        self._rank = group.rank()
        self._places: dict[Kind, int] = {}
        end = 0
        for kinds, size in ((_OF_TOKENS, token_bytes), (_OF_CHOICES, choice_bytes)):
            for kind in kinds:
                self._places[kind] = end
                end += -(-self.rows * size // _ALIGNMENT) * _ALIGNMENT
        self._channels = {kind: channel for channel, kind in enumerate(self._places)}
        self._memory, self._handle = _symmetric(end, group, hosts, device)
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        timeout: timedelta = distributed_c10d.default_pg_timeout
        self._timeout = int(timeout.total_seconds() * 1000)

    def holds(self, rows: int, token_bytes: int, choice_bytes: int) -> bool:
        """Whether messages of this size fit."""
        return rows <= self.rows and (token_bytes, choice_bytes) == self.sizes

    def exchange(
        self, kind: Kind, rows: torch.Tensor, leave: Sequence[int], starts: Sequence[int], come: int
    ) -> Message:
        """Write the first ``leave[0]`` of ``rows`` behind row ``starts[0]`` at rank 0, the next at the next.
        The message has the ``come`` rows that others write here, until the next of its kind. Collective."""
        rows, begin = rows.contiguous(), 0
        current = torch.cuda.current_stream(rows.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for rank, (count, start) in enumerate(zip(leave, starts, strict=True)):
                if count:
                    room = self._at(rank, kind, start, (count, *rows.shape[1:]), rows.dtype)
                    room.copy_(rows[begin : begin + count], non_blocking=True)
                begin += count
            self._handle.barrier(self._channels[kind], self._timeout)
            done = self._stream.record_event()
        sent = [rows]

        def wait() -> None:
            torch.cuda.current_stream(rows.device).wait_event(done)
            sent.clear()  # only now may their memory be used again

        return Message(self._at(self._rank, kind, 0, (come, *rows.shape[1:]), rows.dtype), wait)

    def _at(
        self, rank: int, kind: Kind, start: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows of ``shape`` behind row ``start`` in the place of ``kind`` at ``rank``."""
        width = 1
        for size in shape[1:]:
            width *= size
        begin = self._places[kind] // dtype.itemsize + start * width
        found: torch.Tensor = self._handle.get_buffer(rank, list(shape), dtype, begin)
        return found


def _symmetric(
    size: int, group: dist.ProcessGroup, hosts: dist.ProcessGroup, device: torch.device
) -> tuple[torch.Tensor, Any]:
    """``size`` bytes that ranks of ``group`` can reach at each other, and the handle for that. Collective."""
    import torch.distributed._symmetric_memory as symmetric

    memory = handle = reason = None
    try:
        memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(memory, group)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
    reasons: list[Any] = [None] * hosts.size()
    dist.all_gather_object(reasons, reason, group=hosts)
    failed = next((one for one in reasons if one is not None), None)
    if failed is not None or memory is None:
        raise RuntimeError(failed)
    return memory, handle
