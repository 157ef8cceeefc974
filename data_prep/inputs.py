"""Reading input files as a stream of chunks of raw records; nothing is parsed here but Parquet.

=========== =====================================================================================
`.txt`      UTF-8; lines that hold only ``<|endoftext|>`` separate documents, without such a line the
            whole file is one document
`.jsonl`    one JSON object a line; also `.jsonl.gz` and `.jsonl.zst`
`.parquet`  one record a row, with the columns that a JSON object would have as keys
=========== =====================================================================================
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rxt_dist.data.manifest import SourceInfo
from rxt_dist.errors import DataError

EXTENSIONS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DOCUMENT_SEPARATOR = b"<|endoftext|>"

_CHUNK_RECORDS = 256
_CHUNK_BYTES = 1 << 20
_PARQUET_COLUMNS = ("id", "text", "query", "answer", "interactions", "system", "marks")


@dataclass(frozen=True)
class RawRecord:
    """A record as it came: JSON bytes, the bytes of a plain text, or a row."""

    line: int
    """First line of the record in its file (row number for Parquet), from 1."""
    content: bytes | dict[str, Any]
    is_text: bool = False
    """``content`` is a whole document, not JSON."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file: the unit that a worker processes."""

    file: str
    records: list[RawRecord]


def check_inputs(paths: Sequence[Path]) -> None:
    """Refuse missing files, unknown extensions and missing readers before any work is done.

    Raises:
        DataError: naming the file.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"input file {path} does not exist")
        extension = _extension(path)
        if extension == ".parquet":
            _import("pyarrow.parquet", path)
        if extension == ".jsonl.zst":
            _import("zstandard", path)


def describe_sources(paths: Sequence[Path]) -> list[SourceInfo]:
    """Name, size and sha256 of every input file."""
    sources = []
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sources.append(SourceInfo(name=path.name, sha256=digest, bytes=path.stat().st_size))
    return sources


def read_chunks(paths: Sequence[Path]) -> Iterator[Chunk]:
    """All records of all files in order; at most a chunk (or one document) is in memory.

    Raises:
        DataError: a file cannot be read or decompressed, naming file and line.
    """
    for path in paths:
        yield from _chunks(str(path), _records(path))


def _extension(path: Path) -> str:
    for extension in sorted(EXTENSIONS, key=len, reverse=True):
        if path.name.endswith(extension):
            return extension
    raise DataError(f"input file {path} has an unknown extension; known are {' '.join(EXTENSIONS)}")


def _import(module: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"reading {path} needs {package}: pip install rxt-dist[prep]") from error


def _chunks(file: str, records: Iterable[RawRecord]) -> Iterator[Chunk]:
    pending: list[RawRecord] = []
    size = 0
    for record in records:
        pending.append(record)
        size += len(record.content) if isinstance(record.content, bytes) else _CHUNK_BYTES // _CHUNK_RECORDS
        if len(pending) >= _CHUNK_RECORDS or size >= _CHUNK_BYTES:
            yield Chunk(file, pending)
            pending, size = [], 0
    if pending:
        yield Chunk(file, pending)


def _records(path: Path) -> Iterator[RawRecord]:
    extension = _extension(path)
    if extension == ".parquet":
        return _parquet_records(path)
    if extension == ".txt":
        return _text_records(path)
    return _json_records(path, extension)


def _lines(path: Path, extension: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without the byte order mark some editors write."""
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if extension == ".jsonl.zst":
        errors = (*errors, _import("zstandard", path).ZstdError)
    number = 0
    try:
        with path.open("rb") as raw:
            for line in _decompressed_lines(raw, path, extension):
                number += 1
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except errors as error:
        raise DataError(f"{path}: line {number + 1}: cannot read on: {error}") from error


def _decompressed_lines(raw: BinaryIO, path: Path, extension: str) -> Iterator[bytes]:
    if extension == ".jsonl.gz":
        with gzip.open(raw) as stream:
            yield from stream
    elif extension == ".jsonl.zst":
        yield from _zstd_lines(raw, path)
    else:
        yield from raw


def _zstd_lines(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines of one or more frames; the library's own stream reader takes a cut file for a complete one."""
    zstandard = _import("zstandard", path)
    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    started = False
    while data := raw.read(_CHUNK_BYTES):
        while data:
            started = True
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            for line in lines:
                yield line + b"\n"
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, started = zstandard.ZstdDecompressor().decompressobj(), False
    if started:
        raise EOFError("the compressed file ends too early")
    if rest:
        yield rest


def _json_records(path: Path, extension: str) -> Iterator[RawRecord]:
    for number, line in _lines(path, extension):
        if line.strip():
            yield RawRecord(number, line)


def _text_records(path: Path) -> Iterator[RawRecord]:
    lines: list[bytes] = []
    first = 1
    for number, line in _lines(path, ".txt"):
        if line.strip() == DOCUMENT_SEPARATOR:
            yield from _text_record(lines, first, ended_by_separator=True)
            lines, first = [], number + 1
        else:
            lines.append(line)
    yield from _text_record(lines, first, ended_by_separator=False)


def _text_record(lines: list[bytes], first: int, *, ended_by_separator: bool) -> Iterator[RawRecord]:
    content = b"".join(lines)
    if ended_by_separator:  # the line break before the separator belongs to the separator
        content = content.removesuffix(b"\n").removesuffix(b"\r")
    if content.strip():
        yield RawRecord(first, content, is_text=True)


def _parquet_records(path: Path) -> Iterator[RawRecord]:
    parquet = _import("pyarrow.parquet", path)
    pyarrow = _import("pyarrow", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _PARQUET_COLUMNS]
            for batch in file.iter_batches(batch_size=_CHUNK_RECORDS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    # A column is a key of every row; an empty cell says that the record lacks the key.
                    yield RawRecord(number, {key: value for key, value in row.items() if value is not None})
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: row {number + 1}: cannot read on: {error}") from error
