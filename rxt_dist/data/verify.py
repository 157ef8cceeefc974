"""Finds damage in a dataset folder before training does."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from tarfile import RECORDSIZE

import numpy as np

from rxt_dist.data.blocks import TAR_BLOCK, block_key
from rxt_dist.data.format import (
    ROLE_ANSWER,
    ROLE_QUERY,
    ConversationBlock,
    ShardIndex,
    TextBlock,
    read_block,
)
from rxt_dist.data.index import IndexFile, join_indices
from rxt_dist.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    IndexInfo,
    Manifest,
    ShardInfo,
    Split,
    load_manifest,
    split_index_name,
)
from rxt_dist.data.tokens import tokenizer_sha256
from rxt_dist.errors import DataError

_END_OF_ARCHIVE = 2 * TAR_BLOCK  # a tar ends with at least two zero blocks
_LONGEST_END = _END_OF_ARCHIVE + RECORDSIZE  # and is filled up to a whole record


def verify_dataset(folder: Path, deep: bool) -> list[str]:
    """Return one sentence for every problem found; an empty list says that the dataset is sound.

    Always checked: manifest, fingerprint and counts, tokenizer, presence and size of every file, sha256 and
    content of every index, that the index of a split is that of its shards, and of every shard the first and
    the last block's name and the end. ``deep``
    reads every byte as well: sha256 of the shards, crc32 and structure of every block, token ids, and the
    lengths that the index claims.
    """
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems = _count_problems(folder, manifest) + _tokenizer_problems(folder, manifest)
    for shard in manifest.shards:
        problems += _shard_problems(folder, manifest, shard, deep)
    for split, info in manifest.split_indices.items():
        problems += _split_index_problems(folder, manifest, split, info)
    listed = {(shard.split, shard.name) for shard in manifest.shards}
    for path in sorted(folder.glob("*/*.tar")):
        if (path.parent.name, path.name) not in listed:
            problems.append(f"{path} is not in the manifest")
    return problems


def _count_problems(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for split, counts in manifest.counts.items():
        for name in ("documents", "conversations", "interactions", "tokens"):
            found, expected = (
                getattr(counts, name),
                sum(getattr(shard, name) for shard in manifest.shards_of(split)),
            )
            if found != expected:
                problems.append(
                    f"{folder / MANIFEST_FILE} counts {found} {name} in {split}, its shards have {expected}"
                )
    return problems


def _tokenizer_problems(folder: Path, manifest: Manifest) -> list[str]:
    try:
        found = tokenizer_sha256(folder / TOKENIZER_FOLDER)
    except DataError as error:
        return [str(error)]
    if found != manifest.tokenizer_sha256:
        return [f"{folder / TOKENIZER_FOLDER}: sha256 of the tokenizer does not match the manifest"]
    return []


def _shard_problems(folder: Path, manifest: Manifest, shard: ShardInfo, deep: bool) -> list[str]:
    path = shard.path_in(folder)
    size = path.stat().st_size if path.is_file() else None
    try:
        index = _checked_index(folder, manifest, shard)
    except DataError as error:
        index, problems = None, [str(error)]
    else:
        problems = []
    if size is None:
        return [f"{path} is missing", *problems]
    if size != shard.bytes:
        problems.insert(
            0, f"{path} has {size} bytes, the manifest says {shard.bytes}{_first_lost(index, size)}"
        )
    if index is None or not size:
        return problems
    problems += _frame_problems(path, index)
    if deep:
        problems += _payload_problems(path, shard, index, manifest.vocab_size)
    return problems


def _first_lost(index: ShardIndex | None, size: int) -> str:
    """Which block is the first that a cut shard of ``size`` bytes lacks, if the index can tell."""
    if index is None:
        return ""
    ends = index.blocks["offset"] + index.blocks["bytes"]
    lost = np.flatnonzero(ends > size)
    return f": block {int(lost[0])} and all after it are cut" if len(lost) else ""


def _frame_problems(path: Path, index: ShardIndex) -> list[str]:
    """Of the shard only its ends are read: the first header of the first and of the last block, and the
    end-of-archive marker."""
    problems = []
    last = len(index.blocks) - 1
    with path.open("rb") as file:
        for block in sorted({0, last}):
            file.seek(int(index.blocks["offset"][block]))
            expected = f"{path.stem[-6:]}_{block:06d}"
            try:
                found = block_key(file.read(TAR_BLOCK))
            except DataError as error:
                problems.append(f"{path}: block {block}: {error}")
                continue
            if found != expected:
                problems.append(f"{path}: block {block} is called {found}, not {expected}")
        file.seek(int(index.blocks["offset"][last] + index.blocks["bytes"][last]))
        tail = file.read(_LONGEST_END + 1)
    if not _END_OF_ARCHIVE <= len(tail) <= _LONGEST_END or tail.strip(b"\0"):
        problems.append(f"{path}: the end-of-archive marker is missing")
    return problems


def _checked_index(folder: Path, manifest: Manifest, shard: ShardInfo) -> ShardIndex:
    path = shard.index_path_in(folder)
    index = ShardIndex.read(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != shard.idx_sha256:
        raise DataError(f"{path}: sha256 does not match the manifest")
    if index.kind != manifest.kind or index.dtype.name != manifest.dtype:
        raise DataError(f"{path} is an index of {index.kind} in {index.dtype.name}, not of this dataset")
    interactions = 0 if index.query_tokens is None else len(index.query_tokens)
    tokens = int(index.document_tokens.sum(dtype=np.int64))
    found = (len(index.blocks), len(index.document_tokens), interactions, tokens)
    if found != (shard.blocks, shard.documents, shard.interactions, shard.tokens):
        raise DataError(
            f"{path}: blocks, documents, interactions, tokens are {found}, not those of the manifest"
        )
    return index


def _split_index_problems(folder: Path, manifest: Manifest, split: Split, info: IndexInfo) -> list[str]:
    path = folder / split / split_index_name(split)
    try:
        file = IndexFile.read(path, info.sha256)
        found = join_indices([file], file.header.kind, file.header.dtype)
        if path.stat().st_size != info.bytes:
            raise DataError(f"{path} has {path.stat().st_size} bytes, the manifest says {info.bytes}")
    except DataError as error:
        return [str(error)]
    try:
        parts = [
            IndexFile.read(shard.index_path_in(folder), shard.idx_sha256)
            for shard in manifest.shards_of(split)
        ]
        expected = join_indices(parts, manifest.kind, np.dtype(manifest.dtype).newbyteorder("<"))
    except DataError:  # said of the shard
        return []
    same = found.kind == expected.kind and found.dtype == expected.dtype
    names = ("blocks", "document_tokens", "interactions", "system_tokens", "query_tokens", "answer_tokens")
    pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
    if same and all(np.array_equal(left, right) for left, right in pairs):
        return []
    return [f"{path}: it is not the index of the shards of {split}"]


def _payload_problems(path: Path, shard: ShardInfo, index: ShardIndex, vocab_size: int) -> list[str]:
    problems = []
    with path.open("rb") as file:
        # Not closed by hand: decoded blocks are views of the map, which goes when the last of them goes.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        problems.append(f"{path}: sha256 does not match the manifest")
    document, interaction = 0, 0
    for number, row in enumerate(index.blocks):
        documents = slice(document, document + int(row["documents"]))
        document = documents.stop
        interactions = slice(interaction, interaction)
        if index.interactions is not None:
            interaction += int(index.interactions[documents].sum(dtype=np.int64))
            interactions = slice(interactions.start, interaction)
        try:
            block = read_block(data, index, number)
            if int(block.tokens.max()) >= vocab_size:
                raise DataError(
                    f"block {number}: token id {int(block.tokens.max())} is not below {vocab_size}"
                )
            if not _lengths_match(block, index, documents, interactions):
                raise DataError(f"block {number}: lengths are not those of the index")
        except DataError as error:
            problems.append(f"{path}: {error}")
    return problems


def _lengths_match(
    block: TextBlock | ConversationBlock, index: ShardIndex, documents: slice, interactions: slice
) -> bool:
    if isinstance(block, TextBlock):
        return np.array_equal(np.diff(block.document_starts), index.document_tokens[documents])
    assert index.query_tokens is not None
    assert index.answer_tokens is not None
    lengths = np.diff(block.segment_starts)
    return (
        np.array_equal(
            np.diff(block.segment_starts[block.conversation_segments]), index.document_tokens[documents]
        )
        and np.array_equal(lengths[block.roles == ROLE_QUERY], index.query_tokens[interactions])
        and np.array_equal(lengths[block.roles == ROLE_ANSWER], index.answer_tokens[interactions])
    )
