"""Packages that only some uses need."""

from __future__ import annotations

import importlib
from typing import Any

from rxt_dist.errors import DataError


def require(module: str, why: str, extra: str = "prep") -> Any:
    """Import an optional package to read ``why``.

    Raises:
        DataError: it is not installed; the message says what needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"reading {why} needs {package}: pip install rxt-dist[{extra}]") from error
