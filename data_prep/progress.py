"""The progress bar of long commands."""

from __future__ import annotations

import sys
from typing import NoReturn

from tqdm import tqdm


def progress_bar(description: str, unit: str, total: int | None = None) -> tqdm[NoReturn]:
    """A bar on stderr with rate, and remaining time if the ``total`` is known; silent when stderr is not a
    terminal, so that logs stay readable. The unit "B" (bytes) is scaled, others are in the plural."""
    is_bytes = unit == "B"
    return tqdm(
        desc=description,
        total=total,
        unit="B" if is_bytes else f" {unit}s",
        unit_scale=is_bytes,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
    )
