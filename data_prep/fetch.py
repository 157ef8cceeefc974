"""Fetching remote input files to the local disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.sources import Source
from rxt_dist.data.remote import fetch


@contextmanager
def local_file(source: Source, folder: Path) -> Iterator[Path]:
    """The path of ``source``; a remote file is copied into ``folder`` and removed on leaving.

    Raises:
        DataError: it cannot be fetched; a passing failure has been tried again a few times.
    """
    if not source.is_remote:
        yield Path(source.location)
        return
    folder.mkdir(exist_ok=True)
    path = folder / source.name
    try:
        with path.open("wb") as copy:
            fetch(source.location, copy)
        yield path
    finally:
        path.unlink(missing_ok=True)
