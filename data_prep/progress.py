"""The progress bar of long commands."""

from __future__ import annotations

import sys
from typing import NoReturn

from tqdm import tqdm


def progress_bar(description: str, unit: str) -> tqdm[NoReturn]:
    """A bar on stderr; silent when stderr is not a terminal, so that logs stay readable."""
    return tqdm(desc=description, unit=f" {unit}s", file=sys.stderr, disable=not sys.stderr.isatty())
