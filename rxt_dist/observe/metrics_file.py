"""The metrics of a run as JSON lines: the record that survives the process.

One JSON object a line, in the order of the steps. JSON has no numbers for NaN and the infinities, so
they are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``: any JSON reader takes the file, and
Python's ``float()`` takes the strings. A line is either whole or, after a crash, the torn last one,
which is dropped when the file is opened again.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
"""Name, in the folder of a run, of the file of logged training steps."""
EVALUATION_FILE = "eval.jsonl"
"""Name, in the folder of a run, of the file of evaluations."""


class MetricsFile:
    """Append-only writer of one metrics file, for one process.

    Opening drops a torn last line, so that what is written next starts a line of its own.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending; the file and its folder are made if they do not exist.

        Raises:
            OSError: the file cannot be opened for writing.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append ``record`` as one line, in one system call; it is visible to readers at once.

        Args:
            record: must hold the integer ``"step"``; values are what JSON can express, of any depth.

        Raises:
            ValueError: no integer ``"step"``.
            TypeError: a value that JSON cannot express (a tensor, for example).
            OSError: the file system took no or only part of the line (disk full).
        """
        if type(record.get("step")) is not int:
            raise ValueError(f"a metrics record needs an integer 'step', found {record.get('step')!r}")
        line = json.dumps(_finite(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        written = os.write(self._descriptor, line)
        if written != len(line):
            raise OSError(errno.ENOSPC, "the metrics line was only written in part", str(self.path))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in the order of the file; empty if the file does not exist.

    Lines that are no record (a torn last line, a block that a power failure left empty) are skipped and
    their number is logged as a warning.
    """
    return [record for record, _ in _parsed_lines(path)]


def truncate_after(path: Path, step: int) -> None:
    """Drop the records of steps after ``step``, as a resumed run will write them again.

    The file is replaced atomically; a reader sees the old or the new one. Lines that are no record are
    dropped too. Nothing happens if the file does not exist. No writer may have the file open.

    Args:
        path: the metrics file.
        step: the last step to keep.

    Raises:
        OSError: the folder of the file is not writable.
    """
    if not path.exists():
        return
    kept = b"".join(line + b"\n" for record, line in _parsed_lines(path) if record["step"] <= step)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(kept)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(path.stat().st_mode & 0o777)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _parsed_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    if not path.exists():
        return []
    content = path.read_bytes()
    # What follows the last line end was never completed, even if it happens to be valid JSON.
    lines = content.split(b"\n")
    unreadable = 1 if lines.pop() else 0
    parsed = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            parsed.append((record, line))
        else:
            unreadable += 1
    if unreadable:
        _logger.warning("%s: %d damaged line(s) skipped", path, unreadable)
    return parsed


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        end = content.rfind(b"\n") + 1
        if end != len(content):
            _logger.warning("%s: dropped an incomplete last line", path)
            stream.truncate(end)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
