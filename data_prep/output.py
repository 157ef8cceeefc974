"""Output folders of the commands that prepare data."""

from __future__ import annotations

from pathlib import Path

from rxt_dist import files
from rxt_dist.errors import DataError


class OutputFolder(files.OutputFolder):
    """An output folder that appears complete or not at all; see :class:`rxt_dist.files.OutputFolder`."""

    def __init__(self, target: Path) -> None:
        super().__init__(target, DataError)
