"""The datasets of a run, each opened once whoever asks for it."""

from __future__ import annotations

from pathlib import Path

from rxt_dist.data.cache import ShardCache
from rxt_dist.data.files import DatasetFiles, open_files
from rxt_dist.data.manifest import Split
from rxt_dist.data.reader import Dataset
from rxt_dist.data.split import SplitIndex


class DatasetStore:
    """Opens datasets by their folder or URL, and keeps manifests and, until :meth:`release`, indices."""

    def __init__(
        self,
        *,
        cache_dir: Path | None = None,
        cache_bytes: int | None = None,
        skip_corrupt: bool = False,
    ) -> None:
        """``cache_dir``: folder for fetched shards, at most ``cache_bytes`` of them, and for joined indices.

        Raises:
            DataError: the folder cannot be made.
        """
        self._cache = None if cache_dir is None else ShardCache(cache_dir, cache_bytes)
        self._skip_corrupt = skip_corrupt
        self._files: dict[Path | str, DatasetFiles] = {}
        self._splits: dict[tuple[Path | str, Split], SplitIndex] = {}

    def files(self, location: Path | str) -> DatasetFiles:
        """The dataset at ``location``. Raises DataError if it is missing or its manifest is damaged."""
        if location not in self._files:
            self._files[location] = open_files(location, self._cache)
        return self._files[location]

    def dataset(self, location: Path | str, split: Split) -> Dataset:
        """A reader of a split, which has met no damage yet.

        Raises:
            DataError: an index is missing or damaged, or (unless damage is skipped) a shard is.
        """
        files, key = self.files(location), (location, split)
        if key not in self._splits:
            self._splits[key] = SplitIndex.load(files, split, skip_corrupt=self._skip_corrupt)
        return Dataset(files, split, skip_corrupt=self._skip_corrupt, index=self._splits[key])

    def release(self) -> None:
        """Forget the indices: those that no reader uses any more leave the memory."""
        self._splits.clear()
