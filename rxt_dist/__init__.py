"""Distributed pretraining of Reactive Transformers."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported when asked for: most uses of the package need no model.
_LAZY = {
    "generate": "rxt_dist.inference",
    "load_pretrained": "rxt_dist.interchange.pretrained",
    "save_pretrained": "rxt_dist.interchange.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
