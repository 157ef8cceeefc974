"""Fetching remote input files to the local disk."""

from __future__ import annotations

import http.client
import logging
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from data_prep.sources import Source, require
from rxt_dist.errors import DataError

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_TIMEOUT_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 1.0
_PERMANENT = range(400, 500)


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
        _fetch(source, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _fetch(source: Source, path: Path) -> None:
    pause = _FIRST_PAUSE_SECONDS
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with path.open("wb") as copy:
                _copy(source, copy)
            return
        except urllib.error.HTTPError as error:
            if error.code in _PERMANENT or attempt == _ATTEMPTS:
                raise DataError(f"{source.shown}: cannot fetch: {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            if missing or attempt == _ATTEMPTS:
                raise DataError(f"{source.shown}: cannot fetch: {error or type(error).__name__}") from error
        logger.warning("%s: attempt %d failed, trying again in %.0f s", source.shown, attempt, pause)
        time.sleep(pause)
        pause *= 2


def _copy(source: Source, copy: BinaryIO) -> None:
    if source.location.startswith(("http://", "https://")):
        with urllib.request.urlopen(source.location, timeout=_TIMEOUT_SECONDS) as response:
            shutil.copyfileobj(response, copy, 1 << 20)
            expected = response.headers.get("Content-Length")
        if expected is not None and copy.tell() != int(expected):  # a lost connection looks like the end
            raise OSError(f"{copy.tell()} of {expected} bytes came")
        return
    fsspec = require("fsspec", source.shown)
    with fsspec.open(source.location, "rb") as remote:
        shutil.copyfileobj(cast(BinaryIO, remote), copy, 1 << 20)
