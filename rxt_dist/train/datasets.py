"""The datasets of a run, looked at before anything is trained."""

from __future__ import annotations

from pathlib import Path

from rxt_dist.config import RunConfig, resolve_dataset
from rxt_dist.config.run import STAGE_DATA, DataKind
from rxt_dist.data.manifest import SPLITS, Manifest, load_manifest
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError, DataError

Manifests = dict[DataKind, tuple[Path, Manifest]]


def open_datasets(config: RunConfig) -> Manifests:
    """Folder and manifest of every dataset that the stages read, by field of ``data``.

    Raises DataError when one is missing or incomplete, :class:`ConfigError` when it is of another kind.
    """
    manifests: Manifests = {}
    for stage in config.stages:
        kind = STAGE_DATA[stage.name]
        folder = getattr(config.data, kind)
        if kind not in manifests:
            manifest = load_manifest(folder)
            if manifest.kind != kind:
                raise ConfigError(f"data.{kind}: {folder} is a dataset of {manifest.kind}, expected {kind}")
            manifests[kind] = (folder, manifest)
    return manifests


def check_splits(manifests: Manifests) -> None:
    """Look at both splits of every dataset, so that damage shows before the first stage trains.

    Raises :class:`DataError` when an index or a shard is missing or damaged, or a split is empty.
    """
    for folder, _ in manifests.values():
        for split in SPLITS:
            if Dataset(folder, split).num_documents == 0:
                raise DataError(f"{folder} has nothing in its split {split}; training needs train and val")


def resolve(config: RunConfig, manifests: Manifests) -> RunConfig:
    """Fill in what the datasets decide (see :func:`rxt_dist.config.resolve_dataset`)."""
    first = next(iter(manifests.values()))[1]
    hashes = {kind: manifest.tokenizer_sha256 for kind, (_, manifest) in manifests.items()}
    return resolve_dataset(
        config, vocab_size=first.vocab_size, special_ids=first.special_tokens, tokenizer_sha256=hashes
    )
