"""The records of all inputs, cut into the parts that workers process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from data_prep.fetch import local_file
from data_prep.readers import RawRecord, read_records, row_record
from data_prep.sources import Source
from rxt_dist.errors import DataError
from rxt_dist.packages import require

_CHUNK_RECORDS = 256
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one source: what is tokenised at once."""

    source: int
    """Number of the source."""
    file: str
    """The source as messages name it."""
    records: list[RawRecord]

    @property
    def size(self) -> int:
        """Bytes of the records, about."""
        return sum(record.size for record in self.records)


@dataclass(frozen=True)
class Position:
    """A place between two records."""

    source: int = 0
    record: int = 0
    """Records of the source before it."""


@dataclass(frozen=True)
class RawPart:
    """Consecutive chunks: the unit of work of a process, and of what a killed run keeps."""

    number: int
    chunks: list[Chunk]
    end: Position


class SourceLog(Protocol):
    """Told of the content of every source that is read."""

    def record(self, number: int, sha256: str, size: int) -> None:
        """Source ``number`` has this hash and so many bytes."""


class InputReader:
    """Reads sources in order, from any position; remote files are fetched into ``folder`` one at a time."""

    def __init__(self, sources: Sequence[Source], folder: Path, log: SourceLog | None = None) -> None:
        self._sources, self._folder, self._log = sources, folder, log
        self.bytes_read = 0
        """Bytes of the files read so far, as far as sizes are known; for a progress bar."""

    def chunks(
        self, start: Position = Position(), chunk_bytes: int = _CHUNK_BYTES
    ) -> Iterator[tuple[Chunk, Position]]:
        """All chunks after ``start``, each of about ``chunk_bytes`` at most and with the position after it.

        Raises:
            DataError: a file cannot be read or decompressed, naming file and place.
        """
        for number in range(start.source, len(self._sources)):
            seen = start.record if number == start.source else 0
            for records in _grouped(_after(self._records(number), seen), chunk_bytes):
                seen += len(records)
                yield Chunk(number, self._sources[number].shown, records), Position(number, seen)

    def parts(self, part_bytes: int, first: int, start: Position) -> Iterator[RawPart]:
        """Everything after ``start`` in parts of about ``part_bytes``, numbered from ``first``."""
        chunks: list[Chunk] = []
        size, end = 0, start
        for chunk, end in self.chunks(start, min(part_bytes, _CHUNK_BYTES)):
            chunks.append(chunk)
            size += chunk.size
            if size >= part_bytes:
                yield RawPart(first, chunks, end)
                first, chunks, size = first + 1, [], 0
        if chunks:
            yield RawPart(first, chunks, end)

    def _records(self, number: int) -> Iterator[RawRecord]:
        source = self._sources[number]
        if source.format == "hf":
            yield from self._table_records(number)
            return
        before = sum(earlier.bytes for earlier in self._sources[:number])
        with local_file(source, self._folder) as path, path.open("rb") as raw:
            if self._log is not None:
                digest = hashlib.file_digest(raw, "sha256").hexdigest()
                self._log.record(number, digest, raw.tell())
                raw.seek(0)
            for record in read_records(source, raw):
                if source.bytes and source.format != "parquet":  # whose footer is read first
                    self.bytes_read = before + raw.tell()
                yield record
        self.bytes_read = before + source.bytes

    def _table_records(self, number: int) -> Iterator[RawRecord]:
        digest, size = hashlib.sha256(), 0
        for place, row in enumerate(_hub_rows(self._sources[number]), 1):
            content = json.dumps(row, sort_keys=True, default=str).encode() + b"\n"
            digest.update(content)
            size += len(content)
            yield row_record(place, row)
        if self._log is not None:
            self._log.record(number, digest.hexdigest(), size)


def _hub_rows(source: Source) -> Iterable[dict[str, Any]]:
    datasets = require("datasets", f"hf:{source.location}", "huggingface")
    name, colon, split = source.location.rpartition(":")
    if not colon:
        name, split = source.location, "train"
    try:
        if not Path(name).is_dir():
            found = datasets.load_dataset(name, split=split, streaming=True)
            return cast(Iterable[dict[str, Any]], found)
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise DataError(f"hf:{source.location} has no split {split}; it has {' '.join(found)}")
            found = found[split]
        return cast(Iterable[dict[str, Any]], found)
    except (OSError, ValueError) as error:
        raise DataError(f"hf:{source.location}: cannot load the dataset: {error}") from error


def _after(records: Iterator[RawRecord], count: int) -> Iterator[RawRecord]:
    for number, record in enumerate(records):
        if number >= count:
            yield record


def _grouped(records: Iterable[RawRecord], chunk_bytes: int) -> Iterator[list[RawRecord]]:
    group: list[RawRecord] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.size
        if len(group) >= _CHUNK_RECORDS or size >= chunk_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group
