"""Files of web servers and of the stores that fsspec knows: fetched whole, checked, tried again."""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

from rxt_dist.errors import DataError
from rxt_dist.packages import require

logger = logging.getLogger(__name__)

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_ATTEMPTS = 4
_TIMEOUT_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 1.0
_CHUNK_BYTES = 1 << 20
_MISSING = (404, 410)
_PASSING = (408, 425, 429)  # refusals of a server that is worth asking again


class UnreachableError(DataError):
    """A file could not be fetched, which says nothing about whether it is sound."""


class _DamagedError(Exception):
    """What came is not the file that was asked for."""


class _GivenUpError(Exception):
    """Asking again is of no use."""


def is_url(location: object) -> bool:
    """Whether a dataset or an input is somewhere else than in the file system."""
    return isinstance(location, str) and _URL.match(location) is not None


def shown_url(url: str) -> str:
    """The URL without user name, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def join_url(url: str, path: str) -> str:
    """The URL of ``path`` below ``url``, whose query is kept."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}"))


def fetch(
    url: str,
    target: BinaryIO,
    *,
    size: int | None = None,
    sha256: str | None = None,
    largest: int | None = None,
) -> None:
    """Copy the file at ``url`` into ``target``, a file opened for writing, in place of what it holds.

    Args:
        size, sha256: what the file must have; None: anything.
        largest: bytes after which reading stops.

    Raises:
        UnreachableError: it cannot be fetched; what may pass has been tried again a few times.
        DataError: it does not exist, or is repeatedly not the one that was asked for.
    """
    shown, pause = shown_url(url), _FIRST_PAUSE_SECONDS
    for attempt in range(1, _ATTEMPTS + 1):
        last = attempt == _ATTEMPTS
        try:
            _copy(url, target, size, sha256, size if largest is None else largest)
            return
        except FileNotFoundError as error:
            raise DataError(f"{shown}: cannot fetch: {error or 'no such file'}") from error
        except _GivenUpError as error:
            raise UnreachableError(f"{shown}: cannot fetch: {error}") from error
        except _DamagedError as error:
            problem = f"{shown} is damaged: {error}"
            if last:
                raise DataError(f"{problem} (fetched {attempt} times)") from error
        except (OSError, http.client.HTTPException) as error:
            problem = f"{shown}: cannot fetch: {error or type(error).__name__}"
            if last:
                raise UnreachableError(problem) from error
        logger.warning("%s; trying again in %.0f s (attempt %d of %d)", problem, pause, attempt, _ATTEMPTS)
        time.sleep(pause)
        pause *= 2


def _copy(url: str, target: BinaryIO, size: int | None, sha256: str | None, largest: int | None) -> None:
    digest, count = hashlib.sha256(), 0
    target.seek(0)
    for chunk in _chunks(url):
        count += len(chunk)
        if largest is not None and count > largest:
            raise _DamagedError(f"it has more than {largest} bytes")
        digest.update(chunk)
        target.write(chunk)
    target.truncate()
    if size not in (None, count):
        raise _DamagedError(f"it has {count} bytes, the manifest says {size}")
    if sha256 not in (None, digest.hexdigest()):
        raise _DamagedError("its sha256 does not match the manifest")


def _chunks(url: str) -> Iterator[bytes]:
    return _http_chunks(url) if url.startswith(("http://", "https://")) else _store_chunks(url)


def _http_chunks(url: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            expected, count = response.headers.get("Content-Length"), 0
            while chunk := response.read(_CHUNK_BYTES):
                count += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"{error.code} {error.reason}"
        if error.code in _MISSING:
            raise FileNotFoundError(reason) from error
        if 400 <= error.code < 500 and error.code not in _PASSING:
            raise _GivenUpError(reason) from error
        raise
    except (ValueError, http.client.InvalidURL) as error:
        raise _GivenUpError(error) from error
    if expected is not None and count != int(expected):  # a lost connection looks like the end
        raise OSError(f"{count} of {expected} bytes came")


def _store_chunks(url: str) -> Iterator[bytes]:
    fsspec = require("fsspec", shown_url(url), "remote")
    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except (ValueError, ImportError, PermissionError) as error:  # an unknown scheme, a package that lacks
        raise _GivenUpError(error) from error
    except (OSError, GeneratorExit):
        raise
    except Exception as error:  # the packages of the stores have exceptions of their own
        raise OSError(f"{type(error).__name__}: {error}") from error
