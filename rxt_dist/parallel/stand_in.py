"""Modules that stand where those of a whole model stood."""

from __future__ import annotations

from torch import nn


def take_over(part: nn.Module, whole: nn.Module) -> None:
    """Give ``part`` all that ``whole`` has, before what differs is replaced."""
    vars(part).update(vars(whole))
    part._parameters, part._modules = dict(whole._parameters), dict(whole._modules)
