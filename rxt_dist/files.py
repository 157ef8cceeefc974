"""Writing files so that they survive a crash: complete or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from rxt_dist.errors import RxtError


def write_synced(path: Path, content: str) -> None:
    """Write ``path`` as UTF-8 and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power failure."""
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OutputFolder:
    """Context manager: a temporary sibling to write into, synced and renamed to ``target`` on success.

    The leftover of a run that was killed is removed; after an exception the temporary folder is, too.

    Raises:
        error: (an exception class) ``target`` exists and is not an empty folder, or cannot be made.
    """

    def __init__(self, target: Path, error: type[RxtError]) -> None:
        self._target = target.resolve()
        self._temporary = self._target.with_name(f".{self._target.name}.incomplete")
        self._error = error

    def __enter__(self) -> Path:
        if self._target.exists() and not (self._target.is_dir() and not any(self._target.iterdir())):
            raise self._error(
                f"output folder {self._target} exists and is not empty; choose another or remove it"
            )
        shutil.rmtree(self._temporary, ignore_errors=True)
        try:
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise self._error(f"output folder {self._target} cannot be made: {error.strerror}") from error
        return self._temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        for path in self._temporary.rglob("*"):
            _fsync(path)
        fsync_folder(self._temporary)
        self._temporary.replace(self._target)
        fsync_folder(self._target.parent)
