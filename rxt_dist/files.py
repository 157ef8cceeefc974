"""Writing files so that they survive a crash: complete or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(path: Path, content: str) -> None:
    """Write ``path`` as UTF-8 and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
