"""The work folder of a build: what is finished, so that a killed build goes on where it was.

``.NAME.work`` beside the dataset NAME::

    build.json             options and inputs; a build with other options does not touch the folder
    lock                   held by the process that builds
    parts/part-000000.npz  encoded parts of the input
    parts.json             number of parts, once all are there
    sources/000000.json    hash and size of every input that was read
    shards/rxt-train-000000.json   a finished shard and where the next one begins
    dataset/               the dataset to be
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel

from data_prep.inputs import Position
from data_prep.parts import StoredPart
from data_prep.sources import Source
from rxt_dist.data.manifest import ShardInfo, Split
from rxt_dist.errors import DataError
from rxt_dist.files import fsync_folder, write_synced

logger = logging.getLogger(__name__)

_LAYOUT = 1


class SourceState(BaseModel):
    """Content of an input."""

    sha256: str
    bytes: int


class ShardState(BaseModel):
    """A finished shard."""

    info: ShardInfo
    documents: int
    """Documents of its split up to its end."""


class WorkFolder:
    """Context manager that adopts the work of a killed build with the same options, or begins anew.

    After an exception the folder stays if it holds finished parts.

    Raises:
        DataError: the output exists, or the folder is in use or belongs to a build with other options.
    """

    def __init__(self, target: Path, options: dict[str, Any], sources: list[Source]) -> None:
        """``options``: all that determines the output but the inputs, as JSON values."""
        self._target = target.resolve()
        self.path = self._target.with_name(f".{self._target.name}.work")
        self.dataset = self.path / "dataset"
        self._options = options
        self._sources = [{"file": s.full_name, "bytes": s.bytes, "mtime_ns": s.mtime_ns} for s in sources]
        self._expected = {"layout": _LAYOUT, "options": options, "inputs": self._sources}
        self.published = False
        """The build was finished already, but for the removal of its work folder."""

    def __enter__(self) -> WorkFolder:
        occupied = self._target.exists() and not (self._target.is_dir() and not any(self._target.iterdir()))
        if occupied and not self.path.is_dir():
            raise self._occupied()
        self._begin()
        try:
            found = self._description()
            if occupied:
                self.published = found == self._expected and not self.dataset.exists()
                if not self.published:
                    raise self._occupied()
            else:
                self._adopt(found)
        except BaseException:
            if self._description() is None:
                self._remove()
            self._lock.close()
            raise
        return self

    def _occupied(self) -> DataError:
        return DataError(f"output folder {self._target} exists and is not empty; choose another or remove it")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self._has_parts():
            self._remove()
        else:
            logger.warning("%s keeps what is finished: the same command goes on there", self.path)
        self._lock.close()

    def _has_parts(self) -> bool:
        return any((self.path / "parts").glob("*.npz"))

    def _remove(self) -> None:
        """The description goes last: a folder without it holds nothing of value."""
        self._clear()
        (self.path / "build.json").unlink(missing_ok=True)
        shutil.rmtree(self.path)

    def _clear(self) -> None:
        """Remove everything but the lock and the description."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("lock", "build.json"):
                path.unlink()

    def _begin(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise DataError(f"work folder {self.path} cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(
                f"work folder {self.path} is in use: another process builds {self._target}"
            ) from error

    def _description(self) -> dict[str, Any] | None:
        """Options and inputs of the build of the folder; None if it was killed before it wrote them."""
        try:
            found = json.loads((self.path / "build.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _adopt(self, found: dict[str, Any] | None) -> None:
        if found is None or not self._has_parts():
            self._clear()
        elif found != self._expected:
            self._check_options(found)
            self._keep_unchanged(found["inputs"])
        self._write_json(self.path / "build.json", self._expected)
        for leftover in self._folder("parts").glob("*.tmp"):
            leftover.unlink()

    def _check_options(self, found: dict[str, Any]) -> None:
        advice = "finish it with its own options, or remove the folder"
        if found.get("layout") != _LAYOUT:
            raise DataError(f"work folder {self.path} was made by another version of rxt-data; remove it")
        for name, value in self._options.items():
            if found["options"].get(name) != value:
                raise DataError(
                    f"work folder {self.path} belongs to a build with {name} {found['options'].get(name)}, "
                    f"not {value}; {advice}"
                )
        before, now = ([entry["file"] for entry in inputs] for inputs in (found["inputs"], self._sources))
        if before != now:
            raise DataError(f"work folder {self.path} belongs to a build of other inputs; {advice}")

    def _keep_unchanged(self, before: list[dict[str, Any]]) -> None:
        """Inputs were edited since: keep the parts that end before the first of them."""
        pairs = enumerate(zip(before, self._sources, strict=True))
        changed = next(number for number, (old, new) in pairs if old != new)
        logger.warning(
            "%s has changed; its records and all after them are read again", before[changed]["file"]
        )
        number = 0
        while self.part_path(number).is_file() and self._end(number).source < changed:
            number += 1
        for path in self._folder("parts").glob("*.npz"):
            if path >= self.part_path(number):
                path.unlink()
        for path in self._folder("sources").glob("*.json"):
            if int(path.stem) >= changed:
                path.unlink()
        (self.path / "parts.json").unlink(missing_ok=True)
        for folder in ("shards", "dataset"):
            shutil.rmtree(self.path / folder, ignore_errors=True)

    def _end(self, part: int) -> Position:
        with StoredPart(self.part_path(part)) as stored:
            return stored.end

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def _write_json(self, path: Path, content: Any) -> None:
        temporary = path.with_name(path.name + ".tmp")
        write_synced(temporary, json.dumps(content))
        temporary.replace(path)
        fsync_folder(path.parent)

    @property
    def downloads(self) -> Path:
        """Folder for copies of remote inputs."""
        return self.path / "downloads"

    def part_path(self, number: int) -> Path:
        """Where part ``number`` is, or will be."""
        return self._folder("parts") / f"part-{number:06d}.npz"

    @property
    def total_parts(self) -> int | None:
        """Number of parts; None while there may be more."""
        path = self.path / "parts.json"
        return int(json.loads(path.read_bytes())["parts"]) if path.is_file() else None

    def finish_parts(self, count: int) -> None:
        """All parts are written."""
        self._write_json(self.path / "parts.json", {"parts": count})

    def resume_point(self) -> tuple[int, Position]:
        """Number of the first part that is missing, and where it begins."""
        number = 0
        while self.part_path(number).is_file():
            number += 1
        return number, self._end(number - 1) if number else Position()

    def record(self, number: int, sha256: str, size: int) -> None:
        """Remember the content of input ``number``.

        Raises:
            DataError: it was read before with another content.
        """
        path = self._folder("sources") / f"{number:06d}.json"
        state = SourceState(sha256=sha256, bytes=size)
        if path.is_file() and self.source(number) != state:
            raise DataError(
                f"{self._sources[number]['file']} has changed since the build began; remove {self.path}"
            )
        self._write_json(path, state.model_dump())

    def source(self, number: int) -> SourceState:
        """What :meth:`record` was told."""
        return SourceState.model_validate_json((self.path / "sources" / f"{number:06d}.json").read_bytes())

    def finished_shards(self, split: Split) -> list[ShardState]:
        """The finished shards of a split in order."""
        found: list[ShardState] = []
        while (path := self._folder("shards") / f"rxt-{split}-{len(found):06d}.json").is_file():
            found.append(ShardState.model_validate_json(path.read_bytes()))
        return found

    def finish_shard(self, info: ShardInfo, documents: int) -> None:
        """A shard is written; ``documents`` of its split end with it."""
        path = self._folder("shards") / f"{Path(info.name).stem}.json"
        self._write_json(path, ShardState(info=info, documents=documents).model_dump())

    def publish(self) -> None:
        """Give the dataset its name."""
        fsync_folder(self.dataset)
        self.dataset.replace(self._target)
        fsync_folder(self._target.parent)
