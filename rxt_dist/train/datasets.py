"""The datasets of a run, looked at before anything is trained."""

from __future__ import annotations

from pathlib import Path

from rxt_dist.config import RunConfig, resolve_dataset
from rxt_dist.config.run import DATA_KINDS, STAGE_DATA
from rxt_dist.data.manifest import SPLITS, Manifest, load_manifest
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError, DataError

Manifests = dict[str, tuple[Path, Manifest]]


def open_datasets(config: RunConfig) -> Manifests:
    """Folder and manifest of every dataset that the stages read, by field of ``data`` (``text``), or by field
    and number in its list (``text.1``).

    Raises DataError when one is missing or incomplete, :class:`ConfigError` when it is of another kind.
    """
    manifests: Manifests = {}
    read = {STAGE_DATA[stage.name] for stage in config.stages}
    for kind in DATA_KINDS:
        datasets = config.data.datasets(kind) if kind in read else []
        for number, dataset in enumerate(datasets):
            name = kind if len(datasets) == 1 else f"{kind}.{number}"
            manifest = load_manifest(dataset.path)
            if manifest.kind != kind:
                raise ConfigError(
                    f"data.{name}: {dataset.path} is a dataset of {manifest.kind}, expected {kind}"
                )
            manifests[name] = (dataset.path, manifest)
    return manifests


def check_splits(manifests: Manifests, *, skip_corrupt: bool) -> None:
    """Look at both splits of every dataset, so that damage shows before the first stage trains.

    Raises :class:`DataError` when an index or (unless ``skip_corrupt``) a shard is missing or damaged, or a
    split is empty.
    """
    for folder, _ in manifests.values():
        for split in SPLITS:
            if Dataset(folder, split, skip_corrupt=skip_corrupt).num_documents == 0:
                raise DataError(f"{folder} has nothing in its split {split}; training needs train and val")


def resolve(config: RunConfig, manifests: Manifests) -> RunConfig:
    """Fill in what the datasets decide (see :func:`rxt_dist.config.resolve_dataset`)."""
    first = next(iter(manifests.values()))[1]
    hashes = {name: manifest.tokenizer_sha256 for name, (_, manifest) in manifests.items()}
    return resolve_dataset(
        config, vocab_size=first.vocab_size, special_ids=first.special_tokens, tokenizer_sha256=hashes
    )
