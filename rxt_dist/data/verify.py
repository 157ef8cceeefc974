"""Finds damage in a dataset folder before training does."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

import numpy as np

from rxt_dist.data.format import (
    ROLE_ANSWER,
    ROLE_QUERY,
    ConversationBlock,
    ShardIndex,
    TextBlock,
    read_block,
)
from rxt_dist.data.manifest import TOKENIZER_FOLDER, Manifest, ShardInfo, load_manifest
from rxt_dist.data.tokens import tokenizer_sha256
from rxt_dist.errors import DataError

_END_OF_ARCHIVE = 1024  # a tar ends with at least two zero blocks of 512 bytes


def verify_dataset(folder: Path, deep: bool) -> list[str]:
    """Return one sentence for every problem found; an empty list says that the dataset is sound.

    Always checked: manifest and fingerprint, tokenizer, presence and size of every file, sha256 and content
    of every index. ``deep`` reads every byte as well: sha256 of the shards, crc32 and structure of every
    block, token ids, and the lengths that the index claims.
    """
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems = _tokenizer_problems(folder, manifest)
    for shard in manifest.shards:
        problems += _shard_problems(folder, manifest, shard, deep)
    listed = {(shard.split, shard.name) for shard in manifest.shards}
    for path in sorted(folder.glob("*/*.tar")):
        if (path.parent.name, path.name) not in listed:
            problems.append(f"{path} is not in the manifest")
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
    problems = []
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        problems.append(f"{path} is missing")
    elif size != shard.bytes:
        problems.append(f"{path} has {size} bytes, the manifest says {shard.bytes}")
    try:
        index = _checked_index(folder, manifest, shard)
    except DataError as error:
        return [*problems, str(error)]
    if not deep or not size:
        return problems
    return problems + _payload_problems(path, shard, index, manifest.vocab_size)


def _checked_index(folder: Path, manifest: Manifest, shard: ShardInfo) -> ShardIndex:
    path = shard.index_path_in(folder)
    index = ShardIndex.read(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != shard.idx_sha256:
        raise DataError(f"{path}: sha256 does not match the manifest")
    if index.kind != manifest.kind or index.dtype.name != manifest.dtype:
        raise DataError(f"{path} is an index of {index.kind} in {index.dtype.name}, not of this dataset")
    found = (len(index.blocks), len(index.document_tokens), int(index.document_tokens.sum(dtype=np.int64)))
    if found != (shard.blocks, shard.documents, shard.tokens):
        raise DataError(f"{path}: blocks, documents, tokens are {found}, not those of the manifest")
    return index


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
    last = index.blocks[-1]
    tail = data[int(last["offset"]) + int(last["bytes"]) :]
    if len(tail) < _END_OF_ARCHIVE or tail.strip(b"\0"):
        problems.append(f"{path}: the end-of-archive marker is missing")
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
