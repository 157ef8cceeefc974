"""Records of one input file; nothing is parsed here but Parquet.

=========== =====================================================================================
`.txt`      UTF-8; lines that hold only ``<|endoftext|>`` separate documents, without such a line the
            whole file is one document
`.jsonl`    one JSON object a line
`.parquet`  one record a row, with the columns that a JSON object would have as keys
`.tar`      one record a WebDataset sample: its member `.txt` (a document), `.json` or `.jsonl` (an object)
=========== =====================================================================================

`.txt`, `.jsonl` and `.tar` may also be compressed: `.gz`, `.zst`.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Self, cast

from data_prep.sources import Source
from rxt_dist.errors import DataError
from rxt_dist.packages import require

DOCUMENT_SEPARATOR = b"<|endoftext|>"
ROW_BYTES = 4096  # what a row of a table counts for where the size of records matters

_BUFFER_BYTES = 1 << 20
_TABLE_ROWS = 256
_COLUMNS = ("id", "text", "query", "answer", "interactions", "system", "marks")
_MAX_MEMBER_BYTES = 1 << 28
_MEMBERS = ("txt", "json", "jsonl")
_END_OF_ARCHIVE = tarfile.EOFHeaderError  # type: ignore[attr-defined]  # two zero blocks


@dataclass(frozen=True)
class RawRecord:
    """A record as it came: JSON bytes, the bytes of a plain text, or a row."""

    place: str
    """Where it is in its file: "line 3", "row 3", "sample 00017"."""
    content: bytes | dict[str, Any]
    is_text: bool = False
    """``content`` is a whole document, not JSON."""

    @property
    def size(self) -> int:
        """Bytes of the content, about."""
        return len(self.content) if isinstance(self.content, bytes) else ROW_BYTES


def read_records(source: Source, raw: BinaryIO) -> Iterator[RawRecord]:
    """All records of the file ``raw`` in order; about a megabyte (or one document) is in memory.

    Raises:
        DataError: the file is damaged, naming the place.
    """
    if source.format == "parquet":
        return _parquet_records(source, raw)
    if source.format == "wds":
        return _sample_records(source, raw)
    return (_text_records if source.format == "txt" else _json_records)(source, raw)


def _read_errors(source: Source) -> tuple[type[Exception], ...]:
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, tarfile.TarError)
    if source.compression == "zst":
        errors = (*errors, require("zstandard", source.shown).ZstdError)
    return errors


def _lines(source: Source, raw: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without the byte order mark some editors write."""
    number = 0
    try:
        for line in _decompressed(source, raw):
            number += 1
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except _read_errors(source) as error:
        raise DataError(f"{source.shown}: line {number + 1}: cannot read on: {error}") from error


def _decompressed(source: Source, raw: BinaryIO) -> BinaryIO:
    if source.compression == "gz":
        return cast(BinaryIO, gzip.open(raw))
    if source.compression == "zst":
        return io.BufferedReader(_ZstdStream(source, raw), _BUFFER_BYTES)
    return raw


class _ZstdStream(io.RawIOBase):
    """One or more frames; the library's own stream reader takes a cut file for a complete one."""

    def __init__(self, source: Source, raw: BinaryIO) -> None:
        self._zstandard = require("zstandard", source.shown)
        self._raw = raw
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._raw.read(_BUFFER_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends too early")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(self._frame.decompress(self._compressed))
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None


def _json_records(source: Source, raw: BinaryIO) -> Iterator[RawRecord]:
    for number, line in _lines(source, raw):
        if line.strip():
            yield RawRecord(f"line {number}", line)


def _text_records(source: Source, raw: BinaryIO) -> Iterator[RawRecord]:
    lines: list[bytes] = []
    first = 1
    for number, line in _lines(source, raw):
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
        yield RawRecord(f"line {first}", content, is_text=True)


def _parquet_records(source: Source, raw: BinaryIO) -> Iterator[RawRecord]:
    parquet = require("pyarrow.parquet", source.shown)
    pyarrow = require("pyarrow", source.shown)
    number = 0
    try:
        with parquet.ParquetFile(raw) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            for batch in file.iter_batches(batch_size=_TABLE_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield row_record(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.shown}: row {number + 1}: cannot read on: {error}") from error


def row_record(number: int, row: dict[str, Any]) -> RawRecord:
    """A row of a table. A column is a key of every row; an empty cell says that the record lacks the key."""
    known = {key: value for key, value in row.items() if key in _COLUMNS and value is not None}
    return RawRecord(f"row {number}", known)


class _StrictTarInfo(tarfile.TarInfo):
    """The library takes a cut archive, or a damaged header, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, _END_OF_ARCHIVE):
                raise
            raise tarfile.ReadError(f"the archive is cut or damaged ({error})") from error


def _sample_records(source: Source, raw: BinaryIO) -> Iterator[RawRecord]:
    """A sample is the run of members whose names are equal up to the first dot of the file name."""
    sample: str | None = None
    found: tuple[str, bytes] | None = None
    try:
        stream = _decompressed(source, raw)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, file = member.name.rpartition("/")
                name, _, extension = file.partition(".")
                key = f"{folder}{slash}{name}"
                if key != sample:
                    if found is not None:
                        yield _sample_record(str(sample), *found)
                    sample, found = key, None
                if extension not in _MEMBERS:
                    continue
                if found is not None:
                    raise DataError(
                        f"{source.shown}: sample {key} has .{found[0]} and .{extension}; "
                        "it must have one of .txt .json .jsonl"
                    )
                found = extension, _member_content(source, tar, member)
            if found is not None:
                yield _sample_record(str(sample), *found)
    except _read_errors(source) as error:
        raise DataError(f"{source.shown}: after sample {sample}: cannot read on: {error}") from error


def _sample_record(sample: str, extension: str, content: bytes) -> RawRecord:
    return RawRecord(f"sample {sample}", content, is_text=extension == "txt")


def _member_content(source: Source, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _MAX_MEMBER_BYTES:
        raise DataError(
            f"{source.shown}: member {member.name} claims {member.size} bytes; at most {_MAX_MEMBER_BYTES} "
            "are read"
        )
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()
