"""Merging and resharding: the same bytes as a build that was asked for the result at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from prep_corpus import CONVERSATIONS, STORIES, write_jsonl

from rxt_dist.data.manifest import fingerprint_of, load_manifest, write_manifest
from rxt_dist.data.verify import verify_dataset

Run = Callable[..., tuple[int, str, str]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def shard(run: Run, corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def build(name: str, kind: str, *inputs: str, **options: object) -> Path:
        settings = {"tokenizer": tokenizer_folder, "workers": 1, "val-fraction": 0.2, **options}
        flat = [part for key, value in settings.items() for part in (f"--{key}", value)]
        for path in inputs:
            flat += ["--input", tmp_path / path]
        code, _, error = run("shard", kind, *flat, "--output", tmp_path / name)
        assert code == 0, error
        return tmp_path / name

    write_jsonl(tmp_path / "stories.jsonl", STORIES)
    write_jsonl(
        tmp_path / "more.jsonl",
        [{"id": f"m{i}", "text": f"More {i} " * (i % 9)} for i in range(1, 60) if i % 9],
    )
    write_jsonl(tmp_path / "talks.jsonl", CONVERSATIONS)
    write_jsonl(tmp_path / "talks2.jsonl", [{**c, "id": f"second-{i}"} for i, c in enumerate(CONVERSATIONS)])
    return build


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_merging_equals_building_at_once(
    run: Run, shard: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    inputs = ("stories.jsonl", "more.jsonl") if kind == "text" else ("talks.jsonl", "talks2.jsonl")
    left = shard("left", kind, inputs[0], **{"block-documents": 5})
    right = shard("right", kind, inputs[1], **{"shard-bytes": 10_240})
    code, output, error = run("merge", left, right, "--output", tmp_path / "merged", "--shard-bytes", 20_480)
    assert code == 0, error
    assert contents(tmp_path / "merged") == contents(shard("both", kind, *inputs, **{"shard-bytes": 20_480}))
    assert load_manifest(tmp_path / "merged").fingerprint in output
    assert verify_dataset(tmp_path / "merged", deep=True) == []


def test_resharding_equals_building_with_that_size(
    run: Run, shard: Callable[..., Path], tmp_path: Path
) -> None:
    big = shard("big", "conversations", "talks.jsonl")
    small = shard("small", "conversations", "talks.jsonl", **{"shard-bytes": 10_240, "block-documents": 4})
    assert len(load_manifest(small).shards) > len(load_manifest(big).shards)
    sizes = ("--shard-bytes", 10_240, "--block-documents", 4)
    assert run("reshard", big, *sizes, "--output", tmp_path / "a")[0] == 0
    assert contents(tmp_path / "a") == contents(small)
    assert run("reshard", small, "--output", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "b") == contents(big)


def test_datasets_of_version_1_become_those_of_version_2(
    run: Run, shard: Callable[..., Path], tmp_path: Path
) -> None:
    new = shard("new", "conversations", "talks.jsonl", **{"shard-bytes": 10_240})
    old = Path(shutil.copytree(new, tmp_path / "old"))
    changed = {"format_version": 1, "split_indices": {}}
    manifest = load_manifest(old).model_copy(update=changed)
    write_manifest(old, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))
    for split in ("train", "val"):
        (old / split / f"rxt-{split}.idx").unlink()
    assert verify_dataset(old, deep=True) == []
    assert "shards: " in run("stats", old)[1]
    assert run("head", old)[1] == run("head", new)[1]
    assert run("reshard", old, "--shard-bytes", 10_240, "--output", tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == contents(new)


def test_counts_of_merged_datasets_add_up(run: Run, shard: Callable[..., Path], tmp_path: Path) -> None:
    left = shard("left", "text", "stories.jsonl", **{"max-tokens": 12, "min-tokens": 5})
    right = shard("right", "text", "more.jsonl", **{"split-documents": 12})
    assert run("merge", left, right, "--output", tmp_path / "merged")[0] == 0
    a, b, both = (load_manifest(folder) for folder in (left, right, tmp_path / "merged"))
    for split in ("train", "val"):
        for name in ("documents", "tokens", "truncated", "split"):
            assert getattr(both.counts[split], name) == sum(getattr(m.counts[split], name) for m in (a, b))
    assert both.counts["train"].truncated > 0 < both.counts["train"].split
    assert both.filters.dropped["short"] == a.filters.dropped["short"]
    assert both.source == [*a.source, *b.source]
    assert (both.max_tokens, both.split_documents, both.filters.min_tokens) == (None, None, None)
    assert both.val_fraction == 0.2


def test_different_shares_held_out_are_warned_of(
    run: Run, shard: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left, right = (
        shard("left", "text", "stories.jsonl"),
        shard("right", "text", "more.jsonl", **{"val-fraction": 0.0}),
    )
    assert run("merge", left, right, "--output", tmp_path / "merged")[0] == 0
    assert "held out different shares" in caplog.text
    counts = load_manifest(tmp_path / "merged").counts
    share = counts["val"].documents / (counts["val"].documents + counts["train"].documents)
    assert load_manifest(tmp_path / "merged").val_fraction == share


def test_datasets_that_do_not_fit_are_refused(
    run: Run, shard: Callable[..., Path], tmp_path: Path, corpus: Path
) -> None:
    text = shard("text", "text", "stories.jsonl")
    talk = shard("talk", "conversations", "talks.jsonl")
    other = tmp_path / "other"
    assert (
        run("tokenizer", "--input", corpus / "stories.jsonl", "--vocab-size", 300, "--output", other)[0] == 0
    )
    foreign = shard("foreign", "text", "stories.jsonl", tokenizer=other)

    def refused(*arguments: object) -> str:
        code, _, error = run(*arguments, "--output", tmp_path / "out")
        assert code == 2
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    assert "talk has kind conversations, but" in refused("merge", text, talk)
    assert "foreign has tokenizer_sha256" in refused("merge", text, foreign)
    assert "the same dataset is given twice" in refused("merge", text, tmp_path / "talk" / ".." / "text")
    assert "no such folder" in refused("merge", text, tmp_path / "none")
    assert "--shard-bytes is 5; it must be at least 10240" in refused("reshard", text, "--shard-bytes", 5)
    assert "--block-documents is 0" in refused("reshard", text, "--block-documents", 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert "exists and is not empty" in run("reshard", text, "--output", tmp_path / "out")[2]


def test_damage_is_not_copied(run: Run, shard: Callable[..., Path], tmp_path: Path) -> None:
    text = shard("text", "text", "stories.jsonl")
    path = text / "train" / "rxt-train-000000.tar"
    content = bytearray(path.read_bytes())
    content[1600] ^= 1
    path.write_bytes(content)
    code, _, error = run("reshard", text, "--output", tmp_path / "out")
    assert code == 2
    assert "rxt-train-000000.tar is damaged: block 0: crc32" in error
    assert not (tmp_path / "out").exists()
    manifest = json.loads((text / "manifest.json").read_text())
    (text / "tokenizer" / "tokenizer.json").write_text("{}")
    code, _, error = run("reshard", text, "--output", tmp_path / "out")
    assert code == 2
    assert "its tokenizer is not the one of its manifest" in error
    assert manifest["tokenizer_sha256"]
