"""Output folders that appear complete or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType

from rxt_dist.errors import DataError
from rxt_dist.files import fsync_folder


class OutputFolder:
    """Context manager: a temporary sibling to write into, renamed to ``target`` on success.

    The leftover of a run that was killed is removed; after an exception the temporary folder is, too.

    Raises:
        DataError: ``target`` exists and is not an empty folder.
    """

    def __init__(self, target: Path) -> None:
        self._target = target.resolve()
        self._temporary = self._target.with_name(f".{self._target.name}.incomplete")

    def __enter__(self) -> Path:
        if self._target.exists() and not (self._target.is_dir() and not any(self._target.iterdir())):
            raise DataError(
                f"output folder {self._target} exists and is not empty; choose another or remove it"
            )
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self._temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        self._temporary.replace(self._target)
        fsync_folder(self._target.parent)
