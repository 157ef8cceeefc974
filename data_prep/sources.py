"""What an `--input` names: files, patterns, folders, URLs, Hugging Face datasets, WebDataset shards.

==================== ======================================================================================
`PATH`               a file with one of the extensions below
`DIRECTORY`          all such files below it, in the order of their paths
`PATTERN`            a glob (``**`` spans folders), in the order of the paths
`http(s)://...`      a file on a web server
`SCHEME://...`       a file, folder or glob of any other store that fsspec knows (s3, gs, hf, memory, ...)
`hf:NAME[:SPLIT]`    a dataset of the Hugging Face hub, or a folder that ``save_to_disk`` wrote
`wds:...`            any of the first five, naming the tars of a WebDataset
==================== ======================================================================================
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rxt_dist.data.remote import is_url, shown_url
from rxt_dist.errors import DataError
from rxt_dist.packages import require

logger = logging.getLogger(__name__)

Format = Literal["txt", "jsonl", "parquet", "wds", "hf"]
Compression = Literal["", "gz", "zst"]

_FILES: dict[str, tuple[Format, Compression]] = {
    ".txt": ("txt", ""),
    ".txt.gz": ("txt", "gz"),
    ".txt.zst": ("txt", "zst"),
    ".jsonl": ("jsonl", ""),
    ".jsonl.gz": ("jsonl", "gz"),
    ".jsonl.zst": ("jsonl", "zst"),
    ".parquet": ("parquet", ""),
}
_TARS: dict[str, tuple[Format, Compression]] = {
    ".tar": ("wds", ""),
    ".tar.gz": ("wds", "gz"),
    ".tar.zst": ("wds", "zst"),
}
EXTENSIONS = tuple(_FILES)


@dataclass(frozen=True)
class Source:
    """One input file, or one Hugging Face dataset."""

    location: str
    """Path, URL, or ``NAME[:SPLIT]``; may hold secrets, so show ``shown``."""
    format: Format
    compression: Compression = ""
    bytes: int = 0
    """Size of a local file, else 0."""
    mtime_ns: int = 0
    """Time of modification of a local file, else 0."""

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched before it can be read."""
        return is_url(self.location)

    @property
    def shown(self) -> str:
        """The location without user name, password and query, which may hold secrets."""
        return shown_url(self.location) if self.is_remote else self.location

    @property
    def full_name(self) -> str:
        """Like ``shown``, but the same for every working directory."""
        return self.shown if self.is_remote or self.format == "hf" else str(Path(self.location).resolve())

    @property
    def name(self) -> str:
        """The name in the manifest, which does not depend on the place of the file."""
        return self.location if self.format == "hf" else self.shown.rstrip("/").rpartition("/")[2]


def resolve_inputs(inputs: Sequence[str | Path]) -> list[Source]:
    """All sources that ``inputs`` name, in order.

    Raises:
        DataError: a file is missing, has an unknown extension, is named twice, or needs a package that is
            not installed; a pattern or folder has no input file.
    """
    sources = [source for text in inputs for source in _resolve(str(text))]
    seen: set[str] = set()
    for source in sources:
        if source.location in seen:
            raise DataError(f"input {source.shown} is given twice")
        seen.add(source.location)
        if source.format == "parquet":
            require("pyarrow.parquet", source.shown)
        if source.compression == "zst":
            require("zstandard", source.shown)
    return sources


def _resolve(text: str) -> list[Source]:
    if text.startswith("hf:") and not is_url(text):
        if not text[3:]:
            raise DataError("input hf: names no dataset; valid: hf:NAME, hf:NAME:SPLIT, hf:FOLDER")
        require("datasets", text, "huggingface")
        return [Source(text[3:], "hf")]
    known = _FILES
    if text.startswith("wds:"):
        text, known = text[4:], _TARS
    return [_source(location, known) for location in _locations(text, known)]


def _source(location: str, known: dict[str, tuple[Format, Compression]]) -> Source:
    found = Source(location, "txt")
    extension = _extension(found.name, known)
    if extension is None:
        raise DataError(f"input file {found.shown} has an unknown extension; known are {' '.join(known)}")
    format_, compression = known[extension]
    if found.is_remote:
        return Source(location, format_, compression)
    status = Path(location).stat()
    return Source(location, format_, compression, status.st_size, status.st_mtime_ns)


def _extension(name: str, known: dict[str, tuple[Format, Compression]]) -> str | None:
    return next((e for e in sorted(known, key=len, reverse=True) if name.endswith(e)), None)


def _locations(text: str, known: dict[str, tuple[Format, Compression]]) -> list[str]:
    if is_url(text):
        return _remote_locations(text, known)
    path = Path(text)
    if path.is_file():
        return [text]
    if path.is_dir():
        files = [str(found) for found in sorted(path.rglob("*")) if found.is_file()]
        return _of_folder(text, [f for f in files if not _hidden(Path(f), path)], known)
    if glob.has_magic(text):
        matches = sorted(match for match in glob.glob(text, recursive=True) if Path(match).is_file())
        if not matches:
            raise DataError(f"input pattern {text} matches no file")
        return matches
    raise DataError(f"input file {text} does not exist")


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _of_folder(text: str, files: list[str], known: dict[str, tuple[Format, Compression]]) -> list[str]:
    """The input files among the files of a folder; the others are counted, as they may be a mistake."""
    usable = [file for file in files if _extension(file, known) is not None]
    if not usable:
        raise DataError(
            f"input folder {text} has no file with a known extension; known are {' '.join(known)}"
        )
    if others := len(files) - len(usable):
        logger.warning("input folder %s: %d files with other extensions left out", text, others)
    return usable


def _remote_locations(text: str, known: dict[str, tuple[Format, Compression]]) -> list[str]:
    if text.startswith(("http://", "https://")):
        return [text]
    scheme, shown = text.partition("://")[0], Source(text, "txt").shown
    fsspec = require("fsspec", shown)
    try:
        filesystem, path = fsspec.core.url_to_fs(text)
        if glob.has_magic(path):
            files = sorted(filesystem.glob(path))
            if not files:
                raise DataError(f"input pattern {shown} matches no file")
        elif filesystem.isdir(path):
            files = _of_folder(shown, sorted(filesystem.find(path)), known)
        else:
            files = [path]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"input {shown}: cannot open the store {scheme}://: {error}") from error
    return [str(filesystem.unstrip_protocol(file)) for file in files]
