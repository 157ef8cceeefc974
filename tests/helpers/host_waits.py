"""Finds where the host waits for a value of the device.

On CUDA PyTorch itself reports it, unless somebody asks for it in so many words: methods called
``synchronize`` are watched too. On a CPU nothing ever waits, so operations are watched whose result (a
Python number, or a shape) depends on values: on a device each of them would make the host wait.
"""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_WATCHED = {
    _aten._local_scalar_dense,
    _aten._unique2,
    _aten.equal,
    _aten.is_nonzero,
    _aten.item,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_consecutive,
    _aten.unique_dim,
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index}
_TO_HOST = {"tolist", "numpy", "cpu"}
_PACKAGES = ("rxt_dist", "deepspeed", "benchmarks")


def _place() -> str:
    """The innermost function of ours or of DeepSpeed on the stack, as ``package/file.py:function``."""
    for frame in reversed(traceback.extract_stack()):
        parts = PurePath(frame.filename).parts
        package = next((name for name in _PACKAGES if name in parts), None)
        if package is not None:
            return f"{package}/{parts[-1]}:{frame.name}"
    return "elsewhere"


def _depends_on_values(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    packet = function.overloadpacket
    if packet in _INDEXING:
        # A mask becomes a list of indexes, whose number is not known before.
        masks = (torch.bool, torch.uint8)
        return any(isinstance(index, torch.Tensor) and index.dtype in masks for index in args[1])
    if packet is _aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return packet in _WATCHED


class _WatchOperations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _depends_on_values(func, args, kwargs or {}):
            self._found.append(_place())
        return func(*args, **(kwargs or {}))


@contextmanager
def _watch_calls(found: list[str], methods: list[tuple[Any, str]]) -> Iterator[None]:
    """Methods are replaced: a mode for functions is not active where a backward pass computes again."""
    thread = threading.current_thread()  # the loader's may read what it likes

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is thread:
                found.append(_place())
            return method(*arguments, **options)

        return call

    originals = [(owner, name, getattr(owner, name)) for owner, name in methods]
    for owner, name, method in originals:
        setattr(owner, name, watched(method))
    try:
        yield
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)


def _synchronisations(device: torch.device) -> list[tuple[Any, str]]:
    """Methods that wait for a device; DeepSpeed's is also called on a CPU, where it does nothing."""
    from deepspeed.accelerator import get_accelerator

    if device.type != "cuda":
        return [(type(get_accelerator()), "synchronize")]
    owners: list[Any] = [torch.cuda, torch.cuda.Stream, torch.cuda.Event]
    return [(owner, "synchronize") for owner in owners]


@contextmanager
def host_waits(device: torch.device) -> Iterator[list[str]]:
    """Inside, places of this thread where the host waits for ``device`` are added to the list."""
    found: list[str] = []
    waiting = _synchronisations(device)
    if device.type != "cuda":
        copies: list[tuple[Any, str]] = [(torch.Tensor, name) for name in sorted(_TO_HOST)]
        with _WatchOperations(found), _watch_calls(found, copies + waiting):
            yield found
        return
    watched = threading.current_thread()  # the loader's thread may wait as it likes

    def note(message: Any, *_: Any, **__: Any) -> None:
        if threading.current_thread() is watched and "synchronizing CUDA operation" in str(message):
            found.append(_place())

    torch.cuda.synchronize(device)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with _watch_calls(found, waiting):
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_of(action: Callable[[], Any]) -> list[str]:
    """Places where the host would wait for a device in ``action``, which runs on the CPU."""
    with host_waits(torch.device("cpu")) as found:
        action()
    return found
