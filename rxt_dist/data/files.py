"""The files of a dataset, wherever they are: in a folder, or at a URL, where they are fetched when needed.

The cache of a run (``data.cache_dir``) has a folder for every dataset, named by the hash of its place and its
manifest. It holds the joined index of each split, and of remote datasets the tokenizer and the shards.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from rxt_dist.data.blocks import starts_of
from rxt_dist.data.cache import ShardCache, locked
from rxt_dist.data.index import IndexFile, ShardIndex, join_indices
from rxt_dist.data.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SPLITS,
    TOKENIZER_FOLDER,
    IndexInfo,
    Manifest,
    ShardInfo,
    Split,
    parse_manifest,
    read_manifest,
    split_index_name,
)
from rxt_dist.data.remote import UnreachableError, fetch, is_url, join_url, shown_url
from rxt_dist.data.tokens import TOKENIZER_FILE
from rxt_dist.errors import DataError

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

OPEN_SHARDS = 256
"""Shards that a reader keeps open at most: each is a file, and a process may have few."""
_CONNECTIONS = 16
"""Files that are fetched at once."""


class DatasetFiles(ABC):
    """One dataset: its manifest, and its other files when they are asked for."""

    name: str
    """The folder or URL, for messages: without what may be secret."""
    manifest: Manifest
    open_shards: int = OPEN_SHARDS
    """Most shards that a reader should hold open."""
    is_remote: bool = False
    """Whether opening a shard may take long, so that several should be opened at once."""

    def __init__(self, name: str, manifest: Manifest, cached: Path | None) -> None:
        self.name = name
        self.manifest = manifest
        self._cached = cached
        """Folder of this dataset in the cache."""

    @abstractmethod
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer. Raises DataError if it has to be fetched and cannot be."""

    @abstractmethod
    def shard_name(self, shard: ShardInfo) -> str:
        """Where a shard is, for messages."""

    @abstractmethod
    def open_shard(self, shard: ShardInfo) -> BinaryIO:
        """Open a shard, which has the size that the manifest says.

        Raises:
            UnreachableError: it cannot be fetched.
            DataError: it is missing or damaged.
        """

    @abstractmethod
    def touch(self, shard: ShardInfo) -> None:
        """Say that a shard that was opened earlier is still read."""

    @abstractmethod
    def _indices(self, shards: list[ShardInfo]) -> Iterator[IndexFile]:
        """The index of each shard, which has the hash of the manifest. Raises DataError."""

    @abstractmethod
    def _split_file(self, split: Split, info: IndexInfo) -> IndexFile:
        """The index of the whole split, which has the hash of the manifest. Raises DataError."""

    @abstractmethod
    def _size_problems(self, shards: list[ShardInfo]) -> Iterator[str]:
        """A sentence for every shard that is missing or has another size, as far as that is cheap to know."""

    def split_index(self, split: Split, *, skip_corrupt: bool = False) -> ShardIndex:
        """The index of all shards of ``split``, joined.

        With a cache it is kept there, and neither indices nor shards are looked at when it is there.
        Otherwise the sizes of shards are compared with the manifest, too; with ``skip_corrupt`` those that
        differ are only a warning.

        Raises:
            DataError: an index is missing or damaged, or a shard is missing or has another size.
        """
        if self._cached is None:
            return self._joined(split, skip_corrupt)
        path = self._cached / f"{split}.idx"
        try:
            self._cached.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                if path.is_file():
                    try:
                        return self._cached_index(path, split)
                    except DataError as error:
                        logger.warning("%s; making it again", error)
                index = self._joined(split, skip_corrupt)
                index.write(path)
                return index
        except OSError as error:
            raise DataError(f"{path}: cannot be cached: {error.strerror}") from error

    def _joined(self, split: Split, skip_corrupt: bool) -> ShardIndex:
        shards = self.manifest.shards_of(split)
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        info = self.manifest.split_indices.get(split)
        if info is not None:
            whole = self._split_file(split, info)
            joined = join_indices([whole], self.manifest.kind, dtype)
            _check_counts(joined, shards, whole.name)
        else:
            indices = list(self._indices(shards))
            for shard, index in zip(shards, indices, strict=True):
                if index.counts != (shard.blocks, shard.documents, shard.interactions):
                    raise DataError(f"{index.name} has other counts than the manifest")
            joined = join_indices(indices, self.manifest.kind, dtype)
        for problem in self._size_problems(shards):
            if not skip_corrupt:
                raise DataError(problem)
            logger.warning("%s", problem)
        return joined

    def _cached_index(self, path: Path, split: Split) -> ShardIndex:
        index = ShardIndex.read(path)
        if index.kind != self.manifest.kind:
            raise DataError(f"{path} is an index of {index.kind}, not of this dataset")
        _check_counts(index, self.manifest.shards_of(split), str(path))
        return index


class LocalFiles(DatasetFiles):
    """A dataset folder of a mounted file system."""

    def __init__(self, folder: Path, cache_dir: Path | None = None) -> None:
        """Raises DataError if the manifest is missing or damaged."""
        data = read_manifest(folder)
        cached = None if cache_dir is None else cache_dir / _key(str(folder.resolve()), data)
        manifest = parse_manifest(data, str(folder / MANIFEST_FILE), known=_is_known(cached))
        super().__init__(str(folder), manifest, cached)
        self._folder = folder

    def tokenizer_folder(self) -> Path:
        return self._folder / TOKENIZER_FOLDER

    def shard_name(self, shard: ShardInfo) -> str:
        # Plain strings: a dataset may have 100,000 shards, and paths are slow.
        return f"{self.name}{os.sep}{shard.split}{os.sep}{shard.name}"

    def open_shard(self, shard: ShardInfo) -> BinaryIO:
        path = self.shard_name(shard)
        try:
            file = open(path, "rb")  # noqa: SIM115 (returned open)
        except OSError as error:
            raise DataError(f"{path}: cannot open the shard: {error.strerror}") from error
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            file.close()
            raise DataError(_other_size(path, size, shard))
        return file

    def touch(self, shard: ShardInfo) -> None:
        pass

    def _indices(self, shards: list[ShardInfo]) -> Iterator[IndexFile]:
        for shard in shards:
            yield IndexFile.read(_index_path(self.shard_name(shard)), shard.idx_sha256)

    def _split_file(self, split: Split, info: IndexInfo) -> IndexFile:
        return IndexFile.read(self._folder / split / split_index_name(split), info.sha256)

    def _size_problems(self, shards: list[ShardInfo]) -> Iterator[str]:
        for shard in shards:
            path = self.shard_name(shard)
            try:
                size = os.stat(path).st_size
            except OSError as error:
                yield f"{path}: cannot open the shard: {error.strerror}"
            else:
                if size != shard.bytes:
                    yield _other_size(path, size, shard)


class RemoteFiles(DatasetFiles):
    """A dataset at a URL; manifest and indices are read at the start, shards when they are needed."""

    is_remote = True

    def __init__(self, url: str, cache: ShardCache) -> None:
        """
        Raises:
            DataError: the manifest cannot be fetched or is damaged, or the cache is too small for a shard.
        """
        self._url, self._cache = url, cache
        data = _fetched(join_url(url, MANIFEST_FILE), largest=MAX_MANIFEST_BYTES)
        folder = cache.folder / _key(url, data)
        name = shown_url(join_url(url, MANIFEST_FILE))
        manifest = parse_manifest(data, name, known=_is_known(folder))
        super().__init__(shown_url(url), manifest, folder)
        self._folder = folder
        self._damaged: dict[str, str] = {}
        largest = max((shard.bytes for shard in manifest.shards), default=1)
        if cache.limit is not None:
            if largest > cache.limit:
                raise DataError(
                    f"data.cache_bytes: found {cache.limit}, but a shard of {self.name} has {largest} bytes; "
                    f"valid: {largest} or more, better as many as all datasets have"
                )
            # What is removed from the cache stays on the disk as long as it is open.
            self.open_shards = min(OPEN_SHARDS, max(1, cache.limit // largest))

    def tokenizer_folder(self) -> Path:
        folder = self._folder / TOKENIZER_FOLDER
        path = folder / TOKENIZER_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".lock"):
                if not path.is_file():
                    url = join_url(self._url, f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}")
                    data = _fetched(url, sha256=self.manifest.tokenizer_sha256, largest=MAX_MANIFEST_BYTES)
                    temporary = path.with_suffix(".tmp")
                    temporary.write_bytes(data)
                    temporary.replace(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be cached: {error.strerror}") from error
        return folder

    def shard_name(self, shard: ShardInfo) -> str:
        return f"{self.name}/{shard.split}/{shard.name} (in {self._folder})"

    def open_shard(self, shard: ShardInfo) -> BinaryIO:
        path = self._shard_path(shard)
        if path.name in self._damaged:
            raise DataError(self._damaged[path.name])
        url = join_url(self._url, f"{shard.split}/{shard.name}")
        try:
            return self._cache.open(
                path, shard.bytes, partial(fetch, url, size=shard.bytes, sha256=shard.sha256)
            )
        except UnreachableError:
            raise
        except DataError as error:  # the file of the server is damaged: not asked for again in this run
            self._damaged[path.name] = str(error)
            raise

    def touch(self, shard: ShardInfo) -> None:
        self._cache.touch(self._shard_path(shard))

    def _shard_path(self, shard: ShardInfo) -> Path:
        return self._folder / shard.split / shard.name

    def _indices(self, shards: list[ShardInfo]) -> Iterator[IndexFile]:
        def read(shard: ShardInfo) -> IndexFile:
            url = join_url(self._url, _index_path(f"{shard.split}/{shard.name}"))
            data = _fetched(url, sha256=shard.idx_sha256, largest=MAX_MANIFEST_BYTES)
            return IndexFile(data, shown_url(url), shard.idx_sha256)

        return in_parallel(read, shards)

    def _split_file(self, split: Split, info: IndexInfo) -> IndexFile:
        url = join_url(self._url, f"{split}/{split_index_name(split)}")
        data = _fetched(url, sha256=info.sha256, largest=info.bytes)
        return IndexFile(data, shown_url(url), info.sha256)

    def _size_problems(self, shards: list[ShardInfo]) -> Iterator[str]:
        return iter(())  # shards are compared when they are fetched


def open_files(location: Path | str, cache: ShardCache | None) -> DatasetFiles:
    """The dataset at ``location``, a folder or a URL; a URL needs a ``cache``.

    Raises:
        DataError: there is none, or its manifest is damaged.
    """
    if is_url(location):
        if cache is None:
            raise DataError(
                f"{shown_url(str(location))} is a URL; set data.cache_dir to a folder for its shards"
            )
        return RemoteFiles(str(location), cache)
    return LocalFiles(Path(location), None if cache is None else cache.folder)


def in_parallel(function: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
    """Results in the order of ``items``; the first error ends it."""
    with ThreadPoolExecutor(_CONNECTIONS, "rxt-fetch") as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _key(place: str, manifest: bytes) -> str:
    return hashlib.sha256(f"{place}\n{hashlib.sha256(manifest).hexdigest()}".encode()).hexdigest()


def _is_known(cached: Path | None) -> bool:
    """Whether the manifest that this folder of the cache is named after has been checked before."""
    return cached is not None and any((cached / f"{split}.idx").is_file() for split in SPLITS)


def _check_counts(index: ShardIndex, shards: list[ShardInfo], name: str) -> None:
    """The blocks, documents and interactions of every shard are those of the manifest."""
    blocks, documents, interactions = (
        starts_of(np.array([getattr(shard, unit) for shard in shards], np.int64))
        for unit in ("blocks", "documents", "interactions")
    )
    found = starts_of(index.blocks["documents"])
    agree = len(index.blocks) == blocks[-1] and np.array_equal(found[blocks], documents)
    if agree and index.interactions is not None:
        agree = np.array_equal(starts_of(index.interactions)[documents], interactions)
    if not agree:
        raise DataError(f"{name} has other counts than the manifest")


def _index_path(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.idx"


def _other_size(path: str, size: int, shard: ShardInfo) -> str:
    return f"{path} is damaged: it has {size} bytes, the manifest says {shard.bytes}"


def _fetched(url: str, *, sha256: str | None = None, largest: int) -> bytes:
    target = io.BytesIO()
    fetch(url, target, sha256=sha256, largest=largest)
    return target.getvalue()
