"""Regional compilation: the functions marked here are compiled by torch.compile while a run asks for it.

A region is compiled once for all layers that run it and for all numbers of rows. Passes without gradients
(evaluation, generation) stay eager, as their shapes change from call to call; but not the frozen parts of a
training step, which say so (:func:`recording`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.fx.experimental._config

P = ParamSpec("P")
R = TypeVar("R")

MOST_VARIANTS = 64
"""Of a region, in all stages of a run; on a CPU, where attention is not compiled, it has the most."""

_enabled = False
_of_a_step = False


def set_compile(enabled: bool, *, with_messages: bool = False) -> None:
    """Whether marked functions are compiled in this process from now on; call before the first step.

    ``with_messages``: ranks exchange rows inside of them, as those that share tensors do. What does not need
    a message is then done while it travels. All ranks compile the same graphs, so messages keep one order.
    """
    global _enabled
    _enabled = enabled
    # Sizes that are equal in the first step by chance (lanes and tokens, where each lane has one) would be
    # taken for one size, and everything compiled again in the second.
    torch.fx.experimental._config.use_duck_shape = not enabled
    if enabled:
        from torch._dynamo import config as dynamo  # both take a second
        from torch._inductor import config as inductor

        # Start our own kernels, half of a region's, as fast as those that the compiler writes.
        if hasattr(inductor, "static_launch_user_defined_triton_kernels"):
            inductor.static_launch_user_defined_triton_kernels = True
        # A rank that gave up compiling would send in another order than the others.
        dynamo.recompile_limit = MOST_VARIANTS
        dynamo.fail_on_recompile_limit_hit = with_messages
        inductor.reorder_for_compute_comm_overlap = with_messages
        inductor.reorder_for_compute_comm_overlap_passes = ["raise_comms", "sink_waits"]


def compiles() -> bool:
    """Whether marked functions are compiled."""
    return _enabled


@contextmanager
def recording(gradients: bool, *, training: bool) -> Iterator[None]:
    """As ``torch.set_grad_enabled(gradients)``. While ``training``, a part that is frozen is compiled too."""
    global _of_a_step
    before, _of_a_step = _of_a_step, training
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        _of_a_step = before


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Mark ``function`` as a region: compiled after :func:`set_compile`, in a training step."""
    return _region(function, needs_grad=True)


def compiled_kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Mark ``function``, which needs no autograd (the inside of an autograd function, random numbers), as a
    region: compiled also where no gradients are recorded."""
    return _region(function, needs_grad=False)


def _region(function: Callable[P, R], *, needs_grad: bool) -> Callable[P, R]:
    fast: Callable[P, R] | None = None

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal fast
        eager = not _enabled or (needs_grad and not torch.is_grad_enabled() and not _of_a_step)
        if eager or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if fast is None:
            fast = torch.compile(function, dynamic=True)
        return fast(*args, **kwargs)

    return run
