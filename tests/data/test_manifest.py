"""Manifests, and the corruption matrix: every kind of damage to a dataset is found."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxt_dist.data.format import ConversationTokens, ShardIndex, ShardWriter, read_block, token_dtype
from rxt_dist.data.index import write_split_indices
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    SplitCounts,
    compute_fingerprint,
    load_manifest,
    write_manifest,
)
from rxt_dist.data.verify import verify_dataset
from rxt_dist.errors import DataError

VOCAB_SIZE = 500


def make_dataset(
    folder: Path,
    kind: Any = "text",
    vocab_size: int = VOCAB_SIZE,
    declared: int | None = None,
    *,
    seed: int = 0,
) -> Path:
    """Three training shards of four blocks and one validation shard; ids below ``vocab_size``."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    dtype = token_dtype(vocab_size)
    rng = np.random.default_rng(seed)
    shards = []
    for split, number in (("train", 0), ("train", 1), ("train", 2), ("val", 0)):
        (folder / split).mkdir(exist_ok=True)
        path = folder / split / f"rxt-{split}-{number:06d}.tar"
        writer = ShardWriter(path, kind, dtype, number, block_documents=3)
        for _ in range(12):
            segments = [rng.integers(0, vocab_size, 300) for _ in range(4)]
            writer.add(segments[0] if kind == "text" else ConversationTokens(segments, [1, 2, 1, 2]))
        shards.append(writer.close())
    identity: dict[str, Any] = {
        "kind": kind,
        "dtype": dtype.name,
        "vocab_size": declared or vocab_size,
        "special_tokens": {"[BOS]": 1},
        "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest(),
        "shards": shards,
        "split_indices": write_split_indices(folder, shards),
    }
    names = ("documents", "conversations", "interactions", "tokens")
    counts = {
        split: SplitCounts(
            truncated=0, **{name: sum(getattr(s, name) for s in shards if s.split == split) for name in names}
        )
        for split in ("train", "val")
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dataset_id="test",
        created_by="test",
        byte_order="little",
        val_fraction=0.1,
        source=[],
        counts=counts,
        fingerprint=compute_fingerprint(**identity),
        **identity,
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("pristine") / "data")


@pytest.fixture
def dataset(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def shard(dataset: Path, number: int = 1) -> Path:
    return dataset / "train" / f"rxt-train-{number:06d}.tar"


def block_offset(dataset: Path, block: int) -> int:
    return int(ShardIndex.read(shard(dataset).with_suffix(".idx")).blocks["offset"][block])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def flip(path: Path, offset: int) -> None:
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 4]))


def swap(left: Path, right: Path) -> None:
    content = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(content)


def garbage(size: int) -> bytes:
    return np.random.default_rng(1).bytes(size)


def index_of(path: Path) -> Path:
    return path.with_suffix(".idx")


def split_index(dataset: Path, split: str = "train") -> Path:
    return dataset / split / f"rxt-{split}.idx"


def respell(path: Path) -> None:
    """The same content, size and arrays with the entries of the header in another order, and a correct
    checksum."""
    whole = ShardIndex.read(path)
    before, after = b'"kind":"text","dtype":"uint16"', b'"dtype":"uint16","kind":"text"'
    content = path.read_bytes()[:-4].replace(before, after)
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    assert before not in content
    assert np.array_equal(ShardIndex.read(path).blocks, whole.blocks)


def adopt(dataset: Path, other: Path) -> None:
    """Make a sound index of something else that of the training split, in the manifest too."""
    content = other.read_bytes()
    split_index(dataset).write_bytes(content)
    info = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(dataset, lambda m: m["split_indices"].update(train=info))


# A text block has the members lens.bin (header 512, payload padded to 512), then tokens.bin. Every row: what
# happens to the second training shard of four blocks, whether a quick verification sees it as well as a deep
# one, and what the messages of the latter must name.
Damage = Callable[[Path], object]
ALWAYS, DEEP = True, False
SHARD, INDEX = r"rxt-train-000001\.tar", r"rxt-train-000001\.idx"
SPLIT_INDEX = r"train/rxt-train\.idx"
CUT_2, IN_2 = f"{SHARD}.*: block 2 and all after it are cut", f"{SHARD}: block 2:"
MATRIX: list[tuple[str, Damage, bool, str]] = [
    ("cut at a member boundary", lambda d: cut(shard(d), block_offset(d, 2)), ALWAYS, CUT_2),
    ("cut between two members of a block", lambda d: cut(shard(d), block_offset(d, 2) + 1024), ALWAYS,
     CUT_2),
    ("cut inside a header", lambda d: cut(shard(d), block_offset(d, 2) + 100), ALWAYS, CUT_2),
    ("cut inside a payload", lambda d: cut(shard(d), block_offset(d, 2) + 1600), ALWAYS, CUT_2),
    ("end of archive cut", lambda d: cut(shard(d), shard(d).stat().st_size - 512), ALWAYS, SHARD),
    ("bit flip in a payload", lambda d: flip(shard(d), block_offset(d, 2) + 1600), DEEP, IN_2),
    ("bit flip in a length", lambda d: flip(shard(d), block_offset(d, 2) + 512), DEEP, IN_2),
    ("bit flip in a header", lambda d: flip(shard(d), block_offset(d, 2) + 3), DEEP, IN_2),
    ("bit flip in the last header", lambda d: flip(shard(d), block_offset(d, 3) + 3), ALWAYS,
     f"{SHARD}: block 3:"),
    ("bit flip in the end of the archive", lambda d: flip(shard(d), shard(d).stat().st_size - 9), ALWAYS,
     f"{SHARD}: the end-of-archive"),
    ("first header zeroed", lambda d: overwrite(shard(d), 0, bytes(512)), ALWAYS, f"{SHARD}: block 0:"),
    ("later header zeroed", lambda d: overwrite(shard(d), block_offset(d, 2), bytes(512)), DEEP,
     IN_2),
    ("4 KiB hole", lambda d: overwrite(shard(d), 4096, bytes(4096)), DEEP, f"{SHARD}: block 1:"),
    ("zero-length shard", lambda d: cut(shard(d), 0), ALWAYS, f"{SHARD}.* block 0 "),
    ("garbage of another size", lambda d: shard(d).write_bytes(garbage(5000)), ALWAYS, f"{SHARD}: block 0"),
    ("garbage of the same size", lambda d: shard(d).write_bytes(garbage(shard(d).stat().st_size)), ALWAYS,
     f"{SHARD}: block 0"),
    ("something appended", lambda d: shard(d).write_bytes(shard(d).read_bytes() + b"\0"), ALWAYS, SHARD),
    ("missing shard", lambda d: shard(d).unlink(), ALWAYS, f"{SHARD} is missing"),
    ("shards swapped", lambda d: swap(shard(d), shard(d, 2)), ALWAYS,
     f"{SHARD}: block 0 is called 000002_000000"),
    ("shards swapped with their indices",
     lambda d: [swap(shard(d), shard(d, 2)), swap(index_of(shard(d)), index_of(shard(d, 2)))], ALWAYS, INDEX),
    ("indices swapped", lambda d: swap(index_of(shard(d)), index_of(shard(d, 2))), ALWAYS, INDEX),
    ("missing index", lambda d: index_of(shard(d)).unlink(), ALWAYS, INDEX),
    ("zero-length index", lambda d: cut(index_of(shard(d)), 0), ALWAYS, INDEX),
    ("cut index", lambda d: cut(index_of(shard(d)), 100), ALWAYS, INDEX),
    ("bit flip in an index", lambda d: flip(index_of(shard(d)), 120), ALWAYS, INDEX),
    ("garbage index", lambda d: index_of(shard(d)).write_bytes(garbage(300)), ALWAYS, INDEX),
    ("missing index of the split", lambda d: split_index(d).unlink(), ALWAYS, SPLIT_INDEX),
    ("zero-length index of the split", lambda d: cut(split_index(d), 0), ALWAYS, SPLIT_INDEX),
    ("cut index of the split", lambda d: cut(split_index(d), 100), ALWAYS, SPLIT_INDEX),
    ("bit flip in the index of the split", lambda d: flip(split_index(d), 300), ALWAYS, SPLIT_INDEX),
    ("garbage index of the split", lambda d: split_index(d).write_bytes(garbage(300)), ALWAYS, SPLIT_INDEX),
    ("indices of the splits swapped", lambda d: swap(split_index(d), split_index(d, "val")), ALWAYS,
     SPLIT_INDEX),
    ("index of the split of another dataset",
     lambda d: shutil.copy(split_index(make_dataset(d.parent / "other", seed=1)), split_index(d)), ALWAYS,
     SPLIT_INDEX),
    ("index of the split in another spelling", lambda d: respell(split_index(d)), ALWAYS, SPLIT_INDEX),
    ("other size of the index of the split",
     lambda d: rewrite(d, lambda m: m["split_indices"]["train"].update(bytes=7)), ALWAYS, SPLIT_INDEX),
    ("another index of the split in the manifest", lambda d: adopt(d, split_index(d, "val")), ALWAYS,
     f"{SPLIT_INDEX}: it is not the index of the shards of train"),
    ("unlisted shard", lambda d: shutil.copy(shard(d), shard(d, 3)), ALWAYS, "000003.tar is not in"),
    ("missing tokenizer", lambda d: (d / "tokenizer" / "tokenizer.json").unlink(), ALWAYS, "tokenizer"),
    ("other tokenizer", lambda d: (d / "tokenizer" / "tokenizer.json").write_text("[]"), ALWAYS, "tokenizer"),
    ("missing manifest", lambda d: (d / "manifest.json").unlink(), ALWAYS, "manifest"),
    ("cut manifest", lambda d: cut(d / "manifest.json", 300), ALWAYS, "manifest"),
    ("bit flip in the manifest", lambda d: flip(d / "manifest.json", 900), ALWAYS, "manifest"),
    ("other counts", lambda d: rewrite(d, lambda m: m["counts"]["val"].update(tokens=1)), ALWAYS,
     "counts 1 tokens in val, its shards have 3600"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "conversations"])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 100_000])
def test_a_sound_dataset_has_no_problems(tmp_path: Path, kind: str, vocab_size: int) -> None:
    dataset = make_dataset(tmp_path / "data", kind, vocab_size)
    assert verify_dataset(dataset, deep=False) == []
    assert verify_dataset(dataset, deep=True) == []


@pytest.mark.parametrize(
    ("damage", "found_by", "named"), [row[1:] for row in MATRIX], ids=[row[0] for row in MATRIX]
)
def test_corruption_matrix(dataset: Path, damage: Damage, found_by: bool, named: str) -> None:
    damage(dataset)
    assert bool(verify_dataset(dataset, deep=False)) == found_by
    problems = verify_dataset(dataset, deep=True)
    assert any(re.search(named, problem) for problem in problems), problems
    assert all(str(dataset) in problem for problem in problems)


def test_problems_name_the_damaged_block(dataset: Path) -> None:
    flip(shard(dataset), block_offset(dataset, 2) + 1600)
    problems = verify_dataset(dataset, deep=True)
    assert problems == [
        f"{shard(dataset)}: sha256 does not match the manifest",
        f"{shard(dataset)}: block 2: crc32 does not match the index",
    ]


def test_every_damaged_shard_is_reported(dataset: Path) -> None:
    shard(dataset, 0).unlink()
    flip(shard(dataset, 2), 700)
    problems = verify_dataset(dataset, deep=True)
    assert any("rxt-train-000000" in problem for problem in problems)
    assert any("rxt-train-000002" in problem for problem in problems)
    assert not any("rxt-train-000001" in problem for problem in problems)


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_ids_outside_of_the_vocabulary_are_found(tmp_path: Path, kind: str) -> None:
    dataset = make_dataset(tmp_path / "data", kind, vocab_size=500, declared=400)
    assert verify_dataset(dataset, deep=False) == []
    assert any("is not below 400" in problem for problem in verify_dataset(dataset, deep=True))


def test_a_consistent_index_of_other_lengths_is_found(dataset: Path) -> None:
    """Only the decoded blocks can tell that lengths were moved between the documents of a block."""
    path = index_of(shard(dataset))
    index = ShardIndex.read(path)
    lengths = index.document_tokens.copy()
    lengths[:2] += np.array([1, -1]).astype(np.uint32)
    changed = ShardIndex(index.kind, index.dtype, index.blocks, lengths).write(path)
    rewrite(dataset, lambda m: m["shards"][1].update(idx_sha256=changed.sha256))
    assert verify_dataset(dataset, deep=False) == [
        f"{split_index(dataset)}: it is not the index of the shards of train"
    ]
    indices = write_split_indices(dataset, load_manifest(dataset).shards)
    infos = {split: info.model_dump() for split, info in indices.items()}
    rewrite(dataset, lambda m: m.update(split_indices=infos))
    assert verify_dataset(dataset, deep=False) == []
    assert verify_dataset(dataset, deep=True) == [
        f"{shard(dataset)}: block 0: lengths are not those of the index"
    ]


def rewrite(dataset: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change the manifest; ``sign`` gives it the fingerprint of its new content."""
    path = dataset / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if sign:
        keys = ("kind", "dtype", "vocab_size", "special_tokens", "tokenizer_sha256")
        manifest = Manifest.model_validate(content)
        content["fingerprint"] = compute_fingerprint(
            **{key: content[key] for key in keys},
            shards=manifest.shards,
            split_indices=manifest.split_indices,
        )
    path.write_text(json.dumps(content))


def test_manifest_round_trip(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    before = (dataset / "manifest.json").read_bytes()
    write_manifest(dataset, manifest)
    assert (dataset / "manifest.json").read_bytes() == before
    assert load_manifest(dataset) == manifest
    assert [s.name for s in manifest.shards_of("val")] == ["rxt-val-000000.tar"]
    assert len(manifest.shards_of("train")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=3), "format_version 3; this version of rxt-dist reads 1 and 2"),
        (lambda m: m.update(format_version=1), "split_indices are not those"),
        (lambda m: m["split_indices"].pop("val"), "split_indices are not those"),
        (lambda m: m["split_indices"]["val"].update(sha256="0" * 64), "fingerprint does not match"),
        (lambda m: m["split_indices"]["val"].update(bytes=0), "split_indices.val.bytes"),
        (lambda m: m.pop("format_version"), "format_version None"),
        (lambda m: m.update(kind="audio"), "kind"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("shards"), "shards"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), "shards.0.name"),
        (lambda m: m["shards"][0].update(tokens=-1), "shards.0.tokens"),
        (lambda m: m["shards"][0].update(tokens=1), "fingerprint does not match"),
        (lambda m: m.update(vocab_size=501), "fingerprint does not match"),
        (lambda m: m["shards"].reverse(), "fingerprint does not match"),
    ],
)
def test_bad_manifests_are_refused(
    dataset: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(dataset, change, sign=False)
    with pytest.raises(DataError, match=message):
        load_manifest(dataset)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, "\xff"])
def test_manifests_that_are_no_json_object_are_refused(dataset: Path, content: str) -> None:
    (dataset / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(dataset)


def test_missing_manifests_and_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        load_manifest(tmp_path)


def test_a_reader_stops_at_payload_damage_without_a_deep_verify(dataset: Path) -> None:
    flip(shard(dataset), block_offset(dataset, 2) + 1600)
    index = ShardIndex.read(shard(dataset).with_suffix(".idx"))
    data = shard(dataset).read_bytes()
    read_block(data, index, 1)
    with pytest.raises(DataError, match="block 2: crc32"):
        read_block(data, index, 2)
