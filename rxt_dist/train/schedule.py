"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from rxt_dist.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int, start: int = 0) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of a stage of ``total_steps``.

    Linear warm-up over ``warmup_steps`` (the first step already moves), then a half cosine to
    ``min_lr_ratio`` of the peak (Loshchilov and Hutter, 2017), or constant. Parameters that train from
    step ``start`` on have a warm-up of their own, under the curve of the others, and 0 before.
    """
    if step < start:
        return 0.0
    warmup = optimizer.warmup_steps
    ramp = min(1.0, (step - start + 1) / warmup) if warmup else 1.0
    return _peak(optimizer, step, total_steps) * ramp


def _peak(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate without warm-up."""
    if step < optimizer.warmup_steps or optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return optimizer.lr * (optimizer.min_lr_ratio + (1.0 - optimizer.min_lr_ratio) * cosine)
