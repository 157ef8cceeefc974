"""Exchange of weights with the published Reactive Transformer checkpoints."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Name -> its module. Loaded on first use: they need the whole model.
_LAZY = {
    "load_reference": "reference",
    "export_reference": "export",
    "reference_of": "export",
    "convert_rope_layout": "export",
}
__all__ = ["convert_rope_layout", "export_reference", "load_reference", "reference_of"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
