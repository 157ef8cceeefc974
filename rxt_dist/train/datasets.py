"""The datasets of a run, looked at before anything is trained."""

from __future__ import annotations

from rxt_dist.config import RunConfig, resolve_dataset
from rxt_dist.config.stage import DATA_KINDS, STAGE_DATA
from rxt_dist.data.files import DatasetFiles
from rxt_dist.data.manifest import SPLITS
from rxt_dist.data.store import DatasetStore
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.stages import dataset_store

OpenedDatasets = dict[str, DatasetFiles]


def open_datasets(config: RunConfig, store: DatasetStore | None = None) -> OpenedDatasets:
    """Every dataset that the stages read, by field of ``data`` (``text``), or by field and number in its list
    (``text.1``).

    Raises DataError when one is missing or incomplete, :class:`ConfigError` when it is of another kind.
    """
    store = store or dataset_store(config)
    opened: OpenedDatasets = {}
    read = {STAGE_DATA[stage.name] for stage in config.stages}
    for kind in DATA_KINDS:
        datasets = config.data.datasets(kind) if kind in read else []
        for number, dataset in enumerate(datasets):
            name = kind if len(datasets) == 1 else f"{kind}.{number}"
            files = store.files(dataset.path)
            if files.manifest.kind != kind:
                raise ConfigError(
                    f"data.{name}: {files.name} is a dataset of {files.manifest.kind}, expected {kind}"
                )
            opened[name] = files
    return opened


def check_splits(config: RunConfig, store: DatasetStore) -> None:
    """Look at both splits of every dataset, so that damage shows before the first stage trains.

    Raises :class:`DataError` when an index or (unless damage is skipped) a shard is missing or damaged, or a
    split is empty.
    """
    for kind in {STAGE_DATA[stage.name] for stage in config.stages}:
        for dataset in config.data.datasets(kind):
            for split in SPLITS:
                opened = store.dataset(dataset.path, split)
                if opened.num_documents == 0:
                    raise DataError(
                        f"{opened.name} has nothing in its split {split}; training needs train and val"
                    )


def resolve(config: RunConfig, opened: OpenedDatasets) -> RunConfig:
    """Fill in what the datasets decide (see :func:`rxt_dist.config.resolve_dataset`)."""
    first = next(iter(opened.values())).manifest
    hashes = {name: files.manifest.tokenizer_sha256 for name, files in opened.items()}
    return resolve_dataset(
        config, vocab_size=first.vocab_size, special_ids=first.special_tokens, tokenizer_sha256=hashes
    )
