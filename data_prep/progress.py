"""The progress of long commands."""

from __future__ import annotations

import io
import logging
import sys
from typing import NoReturn

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LOG_SECONDS = 60.0
"""Time between two lines where stderr is no terminal; a command that takes less writes none."""


class _LogLines(io.TextIOBase):
    """A file that turns the redrawings of a bar into lines of the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logger.info("%s", line)
        return len(text)


def progress_bar(description: str, unit: str, total: int | None = None) -> tqdm[NoReturn]:
    """A bar on stderr with rate, and remaining time if the ``total`` is known; a line a minute when stderr is
    not a terminal. The unit "B" (bytes) is scaled, others are in the plural."""
    is_bytes, is_terminal = unit == "B", sys.stderr.isatty()
    seconds = 0.1 if is_terminal else _LOG_SECONDS
    return tqdm(
        desc=description,
        total=total,
        unit="B" if is_bytes else f" {unit}s",
        unit_scale=is_bytes,
        file=sys.stderr if is_terminal else _LogLines(),
        delay=0.0 if is_terminal else seconds,
        mininterval=seconds,
        maxinterval=max(10.0, seconds),
        miniters=1,
        ascii=None if is_terminal else True,
        ncols=None if is_terminal else 100,
    )
