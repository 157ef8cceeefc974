"""Runs over datasets at URLs: as over folders, on two ranks, after an interruption, in evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.file_server import serve
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, checkpoints, evaluations, metrics, tensors, uninterrupted, untimed

from data_prep.cli import main as rxt_data
from rxt_dist.data.manifest import load_manifest
from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

STAGES = ("joint_lm", "interaction_sft", "smat")
STEPS = 3  # of each stage
SAVED = [2, 3, 4, 6, 8, 9]
RANKS = 2


@pytest.fixture(scope="module")
def site(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets in many shards, as folders that can be served."""
    folder = tmp_path_factory.mktemp("site")
    for name, corpus in (("text", "stories"), ("conversations", "conversations")):
        source = datasets.text.parent / "corpus" / f"{corpus}.jsonl"
        options = ["--tokenizer", datasets.text.parent / "tokenizer", "--val-fraction", 0.1, "--workers", 1]
        options += ["--block-documents", 16, "--shard-bytes", 10240, "--output", folder / name]
        assert rxt_data([str(part) for part in ("shard", name, "--input", source, *options)]) == 0
        assert len(load_manifest(folder / name).shards_of("train")) >= 4
    shutil.copytree(datasets.fewer_stories, folder / "fewer")
    return folder


def settings(place: Path | str, **own: Any) -> dict[str, Any]:
    return SMALL | {
        "data.text": f"[{{path: '{place}/text', weight: 2}}, {{path: '{place}/fewer'}}]",
        "data.conversations": f"{place}/conversations",
        "batch.lanes": 4,
        "stages": "[" + ", ".join(f"{{name: {stage}, steps: {STEPS}}}" for stage in STAGES) + "]",
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 100,
        **own,
    }


@pytest.fixture(scope="module")
def whole(datasets: Datasets, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over the folders."""
    return uninterrupted(datasets, tmp_path_factory, RANKS, settings(site), SAVED)


def assert_same(run: Path, reference: Path) -> None:
    assert untimed(metrics(run)) == untimed(metrics(reference))
    assert untimed(evaluations(run)) == untimed(evaluations(reference))
    ours, theirs = (tensors(checkpoints(folder)[SAVED[-1]]) for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_run_over_urls_is_the_run_over_folders(
    datasets: Datasets, site: Path, whole: Path, tmp_path: Path
) -> None:
    """Bit for bit, with a cache for a part of the shards, stopped in the middle and resumed."""
    shards = [s for name in ("text", "conversations", "fewer") for s in load_manifest(site / name).shards]
    limit = 2 * max(shard.bytes for shard in shards)
    assert sum(shard.bytes for shard in shards) > 2 * limit
    with serve(site) as server:
        cache = {"data.cache_dir": tmp_path / "cache", "data.cache_bytes": limit}
        remote = settings(server.url, **cache)
        run_ranks(RANKS, arguments(datasets, "run", remote), tmp_path).check()
        assert_same(tmp_path / "run", whole)
        for number, path in checkpoints(tmp_path / "run").items():
            if number > 4:
                shutil.rmtree(path)
        (tmp_path / "run/checkpoints/latest").write_text(checkpoints(tmp_path / "run")[4].name)
        shutil.rmtree(tmp_path / "cache")
        run_ranks(RANKS, [*arguments(datasets, "run", remote), "--resume"], tmp_path).check()
        assert_same(tmp_path / "run", whole)
        files = [path for path in (tmp_path / "cache").glob("*/*/*") if ".tar" in path.name]
        assert sum(path.stat().st_size for path in files) <= limit
        assert not [path for path in files if path.name.endswith(".part")]
        kinds = {path.parts[0] for path in (Path(request) for request in server.requests)}
        assert kinds == {"text", "conversations", "fewer"}
        # Each process reads a manifest once, and an index is read by one of them.
        assert server.requests["text/manifest.json"] == 2 * RANKS
        indices = [count for path, count in server.requests.items() if path.endswith(".idx")]
        assert set(indices) == {2}  # the cache was removed once
        results = evaluate_checkpoint(tmp_path / "run")
    local = evaluate_checkpoint(whole)
    assert results == local


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"data.cache_dir": "null"}, ["data.cache_dir", "not set", "URL"]),
        ({"data.cache_bytes": 1000}, ["data.cache_bytes", "found 1000", "bytes; valid:"]),
        ({"data.conversations": "{url}/nowhere"}, ["nowhere/manifest.json", "404"]),
        ({"data.conversations": "nostore://a/b"}, ["nostore://a/b", "Protocol not known"]),
        ({"data.conversations": "{url}/text"}, ["data.conversations", "/text is a dataset of text"]),
        ({"data.cache_dir": "{file}/below"}, ["data.cache_dir", "cannot be used"]),
    ],
)
def test_mistakes_end_the_run_with_one_line(
    datasets: Datasets, site: Path, tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    (tmp_path / "file").touch()
    with serve(site) as server:
        own = {
            key: value.format(url=server.url, file=tmp_path / "file") if isinstance(value, str) else value
            for key, value in change.items()
        }
        chosen = settings(server.url, **{"data.cache_dir": tmp_path / "cache", **own})
        result = run_ranks(1, arguments(datasets, "run", chosen), tmp_path)
    assert result.codes == [2]
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert all(part in line for part in parts), line
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_a_shard_that_is_damaged_on_the_server_ends_the_run_on_all_ranks(
    datasets: Datasets, site: Path, tmp_path: Path
) -> None:
    with serve(site) as server:

        def cut(path: str, number: int, content: bytes) -> bytes:
            return content[:-512] if path.startswith("text/train") and path.endswith(".tar") else content

        server.change = cut
        chosen = settings(server.url, **{"data.cache_dir": tmp_path / "cache"})
        result = run_ranks(RANKS, arguments(datasets, "run", chosen), tmp_path)
    assert 2 in result.codes
    assert any(
        "is damaged: it has" in line for line in result.output.splitlines() if line.startswith("error:")
    )
    assert not list((tmp_path / "cache").glob("*/*/*.part"))
