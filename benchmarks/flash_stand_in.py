"""Something else in the place of flash-attn's kernels, for machines that have no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

import rxt_dist.kernels
from rxt_dist.kernels import attention

_MODULE = "rxt_dist.kernels.flash"


@contextmanager
def flash_stand_in(forward: Callable[..., Any], backward: Callable[..., Any]) -> Iterator[None]:
    """Inside, attention runs on the backend "flash" over ``forward`` and ``backward``, which are called as
    ``flash_attn_interface._flash_attn_varlen_forward`` and ``..._backward``."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    vars(interface)["_flash_attn_varlen_forward"] = forward
    vars(interface)["_flash_attn_varlen_backward"] = backward
    vars(package)["flash_attn_interface"] = interface
    stand_ins = {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
    assert not set(sys.modules) & {*stand_ins, _MODULE}
    before = attention._backend
    sys.modules.update(stand_ins)
    try:
        attention._backend = attention._make_flash()
    finally:
        for name in stand_ins:
            del sys.modules[name]
    try:
        yield
    finally:
        attention._backend = before
        sys.modules.pop(_MODULE)._library._destroy()
        del rxt_dist.kernels.flash


def hollow_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    """Zeros, as fast as an operator can make them."""
    return torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), None, None


def hollow_backward(*tensors: torch.Tensor, **_: Any) -> None:
    """Gradients of zero."""
    for gradient in tensors[6:]:
        gradient.zero_()
