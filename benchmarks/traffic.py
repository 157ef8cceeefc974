"""How many bytes a rank sends, by the collective operations that its process really calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from rxt_dist.errors import TrainingError

Tensors = torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]]


@dataclass
class Traffic:
    """Bytes sent and calls, by kind of operation and name of the process group."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Of ring algorithms, where every rank of a group sends equally much; an all-to-all sends what is for
    others."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, kind: str, group: dist.ProcessGroup, sent: float) -> None:
        self.sent[kind, group.group_name] += sent  # type: ignore[assignment]
        self.calls[kind, group.group_name] += 1


def _size(tensors: Tensors) -> int:
    """Bytes of tensors in lists of any depth."""
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_size(part) for part in tensors)


def _passed_on(size: int, ranks: int) -> float:
    """Bytes a rank sends so that ``size`` bytes go once around a ring."""
    return size * (ranks - 1) / ranks


def _all_reduce(group: dist.ProcessGroup, tensors: Tensors, *_: Any) -> float:
    return 2 * _passed_on(_size(tensors), group.size())


def _first(group: dist.ProcessGroup, whole: Tensors, *_: Any) -> float:
    return _passed_on(_size(whole), group.size())


def _second(group: dist.ProcessGroup, part: Tensors, whole: Tensors, *_: Any) -> float:
    return _passed_on(_size(whole), group.size())


def _to_others(
    group: dist.ProcessGroup,
    output: torch.Tensor,
    sent: torch.Tensor,
    _: Any,
    splits: Sequence[int],
    *__: Any,
) -> float:
    rows, ranks = sent.shape[0], group.size()
    own = splits[group.rank()] if splits else rows // ranks
    return sent.nbytes * (rows - own) / rows if rows else 0.0


def _nothing(group: dist.ProcessGroup, *_: Any) -> float:
    return 0.0


# What each operation of a process group sends. PyTorch has renamed some: older and newer names stand side by
# side. Operations that nothing here calls are missing on purpose: calling one is an error.
_SENT: dict[str, tuple[str, Callable[..., float]]] = {
    "allreduce": ("all-reduce", _all_reduce),
    "allreduce_coalesced": ("all-reduce", _all_reduce),
    "reduce": ("reduce", _first),
    "broadcast": ("broadcast", _first),
    "allgather": ("all-gather", _first),
    "allgather_coalesced": ("all-gather", _first),
    "_allgather_base": ("all-gather", _first),
    "all_gather_single": ("all-gather", _first),
    "allgather_into_tensor_coalesced": ("all-gather", _first),
    "all_gather_single_coalesced": ("all-gather", _first),
    "reduce_scatter": ("reduce-scatter", _second),
    "_reduce_scatter_base": ("reduce-scatter", _second),
    "reduce_scatter_single": ("reduce-scatter", _second),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", _second),
    "reduce_scatter_single_coalesced": ("reduce-scatter", _second),
    "alltoall_base": ("all-to-all", _to_others),
    "all_to_all_single": ("all-to-all", _to_others),
    "barrier": ("barrier", _nothing),
    "_end_coalescing": ("barrier", _nothing),
}


_RETURNS_WORK = re.compile(r"-> [\w.:]*\bWork$", re.MULTILINE)


def _operations() -> dict[str, Any]:
    """Methods of a process group that send something: those that return what can be waited for."""
    methods = vars(dist.ProcessGroup).items()
    return {name: m for name, m in methods if name in _SENT or _RETURNS_WORK.search(m.__doc__ or "")}


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what this process sends meanwhile, in all threads.

    Counted is where every Python caller ends, whatever function of ``torch.distributed`` it has kept: at the
    methods of the process groups. Operations that start from C++ (DistributedDataParallel) are not seen.

    Raises:
        TrainingError: by the operation, if what it sends is not known here.
    """
    traffic = Traffic()
    operations = _operations()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            if name not in _SENT:
                raise TrainingError(f"ProcessGroup.{name} was called: what it sends is not counted")
            kind, sent = _SENT[name]
            traffic.add(kind, group, sent(group, *arguments))
            return original(group, *arguments, **options)

        return call

    for name in operations:
        setattr(dist.ProcessGroup, name, counting(name, getattr(dist.ProcessGroup, name)))
    try:
        yield traffic
    finally:
        for name, method in operations.items():
            setattr(dist.ProcessGroup, name, method)
