"""The manifest of a dataset that was just written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rxt_dist import __version__
from rxt_dist.data.format import token_dtype
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    Filters,
    IndexInfo,
    Kind,
    Manifest,
    ShardInfo,
    SourceInfo,
    Split,
    SplitCounts,
    compute_fingerprint,
)


def make_manifest(
    *,
    kind: Kind,
    vocab_size: int,
    special_tokens: dict[str, int],
    tokenizer_sha256: str,
    max_tokens: int | None,
    split_documents: int | None,
    filters: Filters,
    val_fraction: float,
    source: list[SourceInfo],
    shards: list[ShardInfo],
    split_indices: dict[Split, IndexInfo],
    truncated: Mapping[Split, int],
    pieces: Mapping[Split, int],
) -> Manifest:
    """A manifest; counts, token type, id and fingerprint follow from the rest."""
    dtype = token_dtype(vocab_size).name
    fingerprint = compute_fingerprint(
        kind=kind,
        dtype=dtype,
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        tokenizer_sha256=tokenizer_sha256,
        shards=shards,
        split_indices=split_indices,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        dataset_id=f"{kind}-{fingerprint[:16]}",
        kind=kind,
        created_by=f"rxt-data {__version__}",
        dtype="uint16" if dtype == "uint16" else "uint32",
        byte_order="little",
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        tokenizer_sha256=tokenizer_sha256,
        max_tokens=max_tokens,
        split_documents=split_documents,
        filters=filters,
        val_fraction=val_fraction,
        source=source,
        counts={s: _split_counts(shards, s, truncated=truncated[s], pieces=pieces[s]) for s in SPLITS},
        shards=shards,
        split_indices=split_indices,
        fingerprint=fingerprint,
    )


def _split_counts(
    shards: Sequence[ShardInfo], split: Split, *, truncated: int = 0, pieces: int = 0
) -> SplitCounts:
    """Totals of the shards of one split."""
    members = [shard for shard in shards if shard.split == split]
    return SplitCounts(
        documents=sum(shard.documents for shard in members),
        conversations=sum(shard.conversations for shard in members),
        interactions=sum(shard.interactions for shard in members),
        tokens=sum(shard.tokens for shard in members),
        truncated=truncated,
        split=pieces,
    )
