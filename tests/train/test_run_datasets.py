"""What the start of a run reads of its datasets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import Datasets

from rxt_dist.config import load_config
from rxt_dist.data import files as files_module
from rxt_dist.data.index import IndexFile
from rxt_dist.errors import DataError
from rxt_dist.stages import dataset_store, open_pieces
from rxt_dist.train.datasets import check_splits, open_datasets, resolve

STAGES = "[{name: joint_lm, steps: 5}, {name: interaction_sft, steps: 5}, {name: smat, steps: 5}]"


def start(datasets: Datasets, cache: Path | None) -> list[str]:
    """Everything that a run does with its datasets; the fingerprints of what its stages read."""
    settings = {
        "data.text": datasets.text,
        "data.conversations": datasets.conversations,
        "data.cache_dir": cache or "null",
        "batch.lanes": 4,
        "stages": STAGES,
        "runtime.run_dir": "unused",
    }
    config = load_config("tiny", [f"{name}={value}" for name, value in settings.items()])
    store = dataset_store(config)
    config = resolve(config, open_datasets(config, store))
    check_splits(config, store)
    found = []
    for stage in config.stages:
        found += [open_pieces(config, stage, split, store).fingerprint for split in ("train", "val")]
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the manifests that are parsed, by whether they are checked, and the indices that are read."""
    counted: Counter[str] = Counter()
    parse, read = files_module.parse_manifest, IndexFile.read

    def counting_parse(data: bytes, name: str, *, known: bool = False) -> Any:
        counted["known manifest" if known else "manifest"] += 1
        return parse(data, name, known=known)

    def counting_read(path: Path | str, sha256: str | None = None) -> IndexFile:
        counted["joined" if sha256 is None else "index"] += 1
        return read(path, sha256)

    monkeypatch.setattr(files_module, "parse_manifest", counting_parse)
    monkeypatch.setattr(IndexFile, "read", counting_read)
    return counted


def test_a_start_reads_everything_once(datasets: Datasets, reads: Counter[str], tmp_path: Path) -> None:
    plain = start(datasets, None)
    assert reads == {"manifest": 2, "index": 4}  # two datasets of two splits of a shard each
    reads.clear()
    assert start(datasets, tmp_path / "cache") == plain
    assert reads == {"manifest": 2, "index": 4}
    reads.clear()
    assert start(datasets, tmp_path / "cache") == plain
    assert reads == {"known manifest": 2, "joined": 4}


def test_damage_that_the_first_start_finds_is_found_by_the_next_one(
    datasets: Datasets, tmp_path: Path
) -> None:
    import dataclasses
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(datasets.text, copy)
    (shard,) = (copy / "val").glob("*.tar")
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-512])
    changed = dataclasses.replace(datasets, text=copy)
    for _ in range(2):
        with pytest.raises(DataError, match="the manifest says"):
            start(changed, tmp_path / "cache")
