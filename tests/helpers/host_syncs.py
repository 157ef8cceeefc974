"""Where a program would make the host wait for the device, found on the CPU, where nothing has to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


def syncs_of(action: Callable[[], Any]) -> list[str]:
    """What ``action`` did that waits for a device, in order: tensor methods that read values, and operators
    below them that do or whose results have a size that depends on values."""
    called: list[str] = []
    originals = {name: getattr(torch.Tensor, name) for name in (*METHODS, "to")}

    def counting(name: str) -> Callable[..., Any]:
        def method(*arguments: Any, **options: Any) -> Any:
            if name != "to" or _to_the_host(arguments, options):
                called.append(name)
                with _Silent(found):
                    return originals[name](*arguments, **options)
            return originals[name](*arguments, **options)

        return method

    found = _Operators(called)
    for name in originals:
        setattr(torch.Tensor, name, counting(name))
    try:
        with found:
            action()
    finally:
        for name, method in originals.items():
            setattr(torch.Tensor, name, method)
    return called


def _to_the_host(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    wanted = [*arguments[1:2], options.get("device")]
    return any(isinstance(one, (str, torch.device)) and torch.device(one).type == "cpu" for one in wanted)


class _Operators(TorchDispatchMode):
    def __init__(self, called: list[str]) -> None:
        super().__init__()
        self.called = called
        self.silent = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = func.overloadpacket.__name__, kwargs or {}
        sizes = name in _SIZED_BY_VALUES or (name == "index" and _by_mask(args[1]))
        repeats = func is torch.ops.aten.repeat_interleave.Tensor and options.get("output_size") is None
        result = func(*args, **options)
        reads = isinstance(result, (bool, int, float)) and any(isinstance(one, torch.Tensor) for one in args)
        if not self.silent and (sizes or repeats or reads):
            self.called.append(name)
        return result


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Silent:
    """Operators of a method that is counted already are not counted again."""

    def __init__(self, operators: _Operators) -> None:
        self.operators = operators

    def __enter__(self) -> None:
        self.operators.silent = True

    def __exit__(self, *_: object) -> None:
        self.operators.silent = False
