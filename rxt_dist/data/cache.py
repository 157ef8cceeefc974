"""Shards of remote datasets on the local disk, shared by the processes of a host.

A file is fetched under the name ``NAME.part``, which the process that fetches it holds a lock on, and gets
its name when it is whole and checked. So a file that has its name is sound, and a ``.part`` that nobody holds
a lock on was left by a process that was killed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rxt_dist.errors import DataError

_PART = ".part"
_SHARDS = "*/*/*.tar"
_POLL_SECONDS = 0.05


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process (or thread) at a time gets past this for the same ``path``, a file that stays."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class ShardCache:
    """A folder of shards, ``KEY/SPLIT/NAME.tar``, of which those used least recently are removed.

    A shard that is removed while somebody reads it stays on the disk until it is closed.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        """``limit``: most bytes of all shards in the folder; None: no limit.

        Raises:
            DataError: the folder cannot be made.
        """
        self.folder = folder
        self.limit = limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        except OSError as error:
            raise DataError(f"data.cache_dir: {folder} cannot be used: {error.strerror}") from error

    def open(self, path: Path, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """The file ``path`` in this folder, of ``size`` bytes; ``fetch`` writes it if it is not there.

        Raises:
            DataError: whatever ``fetch`` raises, or the folder cannot be written.
        """
        assert self.limit is None or size <= self.limit
        try:
            while True:
                found = self._opened(path, size)
                if found is not None:
                    return found
                fetched = self._fetched(path, size, fetch)
                if fetched is not None:
                    return fetched
        except OSError as error:
            raise DataError(f"{path}: cannot be cached: {error.strerror}") from error

    def _opened(self, path: Path, size: int) -> BinaryIO | None:
        """The file if it is there; one of another size than it had is removed."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            path.unlink(missing_ok=True)
            return None
        self.touch(path)
        return file

    def touch(self, path: Path) -> None:
        """Say that ``path`` is in use; it may be gone already."""
        with suppress(OSError):
            os.utime(path)

    def _fetched(self, path: Path, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO | None:
        """The file, fetched; None if another process did, or gave up, while this one waited for it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        file = open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115 (returned open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _names(part, file):
                file.close()
                return None
            if path.exists():  # it was finished between the look for it and the lock
                part.unlink()
                file.close()
                return None
            self._fill(path, part, file, size, fetch)
            fcntl.flock(file, fcntl.LOCK_UN)  # a memory map of the file would keep it
        except BaseException:
            file.close()
            raise
        return file

    def _fill(
        self, path: Path, part: Path, file: BinaryIO, size: int, fetch: Callable[[BinaryIO], None]
    ) -> None:
        """Make the locked ``file`` with the name ``part`` the file ``path``."""
        try:
            self._reserve(file, size)
            fetch(file)
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Give ``file`` its final size when the other shards leave room for it, removing old ones."""
        while self.limit is not None:
            with locked(self.folder / ".lock"):
                room = self.limit - size - self._in_flight(file)
                if room >= 0 and self._shrink(room):
                    file.truncate(size)
                    return
            time.sleep(_POLL_SECONDS)  # others are fetching: what they fetch can be removed when it is whole

    def _in_flight(self, own: BinaryIO) -> int:
        """Bytes that all files being fetched will have, but for ``own``."""
        self._remove_leftovers()
        inode = os.fstat(own.fileno()).st_ino
        return sum(status.st_size for _, status in self._files(f"{_SHARDS}{_PART}") if status.st_ino != inode)

    def _shrink(self, room: int) -> bool:
        """Remove the least recently used shards until those left take at most ``room`` bytes."""
        shards = sorted(self._files(_SHARDS), key=lambda entry: entry[1].st_mtime_ns)
        total = sum(status.st_size for _, status in shards)
        for path, status in shards:
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size
        return total <= room

    def _files(self, pattern: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                found.append((path, path.stat()))
        return found

    def _remove_leftovers(self) -> None:
        """Remove what processes that were killed had begun to fetch."""
        for part in self.folder.glob(f"{_SHARDS}{_PART}"):
            with suppress(FileNotFoundError), part.open("rb") as file, suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _names(part, file):
                    part.unlink()


def _names(path: Path, file: BinaryIO) -> bool:
    """Whether ``path`` is the name of the open ``file``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
