"""New shards from the shards of finished datasets: merging and resharding, without tokenising again."""

from __future__ import annotations

import logging
import mmap
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.describe import make_manifest
from data_prep.output import OutputFolder
from data_prep.progress import progress_bar
from data_prep.split_writer import DEFAULT_SHARD_BYTES, MIN_SHARD_BYTES, SplitWriter
from rxt_dist.data.blocks import Block
from rxt_dist.data.cutter import BLOCK_DOCUMENTS
from rxt_dist.data.format import ShardIndex, read_block, token_dtype
from rxt_dist.data.index import write_split_indices
from rxt_dist.data.manifest import (
    SPLITS,
    TOKENIZER_FOLDER,
    DropReason,
    Filters,
    IndexInfo,
    Manifest,
    ShardInfo,
    Split,
    load_manifest,
    write_manifest,
)
from rxt_dist.data.tokens import TOKENIZER_FILE, tokenizer_sha256
from rxt_dist.errors import DataError

logger = logging.getLogger(__name__)

_SAME = ("kind", "tokenizer_sha256", "vocab_size", "special_tokens", "dtype")


def rewrite_datasets(
    folders: Sequence[Path],
    output: Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    block_documents: int = BLOCK_DOCUMENTS,
) -> Manifest:
    """Write the documents of all datasets, one dataset after the other, as a new one.

    Documents stay in their splits. The result has the same bytes as a build from all inputs at once, as
    long as the options agree.

    Raises:
        DataError: a dataset is missing or damaged, the datasets do not fit together, or the output exists.
    """
    if shard_bytes < MIN_SHARD_BYTES:
        raise DataError(f"--shard-bytes is {shard_bytes}; it must be at least {MIN_SHARD_BYTES}")
    if block_documents < 1:
        raise DataError(f"--block-documents is {block_documents}; it must be at least 1")
    manifests = [load_manifest(folder) for folder in folders]
    _check_fit(folders, manifests)
    total = sum(manifest.counts[split].documents for manifest in manifests for split in manifest.counts)
    with OutputFolder(output) as target, progress_bar("writing", "document", total=total) as bar:
        shards: list[ShardInfo] = []
        for split in SPLITS:
            writer = SplitWriter(
                target,
                split,
                manifests[0].kind,
                token_dtype(manifests[0].vocab_size),
                shard_bytes=shard_bytes,
                block_documents=block_documents,
            )
            with writer:
                for folder, manifest in zip(folders, manifests, strict=True):
                    for block in read_blocks(folder, manifest, split):
                        writer.add(block)
                        bar.update(block.num_documents)
            shards += writer.shards
        (target / TOKENIZER_FOLDER).mkdir()
        shutil.copyfile(
            folders[0] / TOKENIZER_FOLDER / TOKENIZER_FILE, target / TOKENIZER_FOLDER / TOKENIZER_FILE
        )
        manifest = _joined_manifest(manifests, shards, write_split_indices(target, shards))
        write_manifest(target, manifest)
    return manifest


def read_blocks(folder: Path, manifest: Manifest, split: Split) -> Iterator[Block]:
    """All blocks of a split in order, checked.

    Raises:
        DataError: a shard or an index is missing or damaged, naming file and block.
    """
    for shard in manifest.shards_of(split):
        path = shard.path_in(folder)
        index = ShardIndex.read(shard.index_path_in(folder))
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot open the shard: {error}") from error
        for number in range(len(index.blocks)):
            try:
                yield read_block(data, index, number)
            except DataError as error:
                raise DataError(f"{path} is damaged: {error}") from error


def _check_fit(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    for folder, manifest in zip(folders, manifests, strict=True):
        for field in _SAME:
            expected, found = getattr(manifests[0], field), getattr(manifest, field)
            if found != expected:
                raise DataError(
                    f"{folder} has {field} {found}, but {folders[0]} has {expected}: they must agree"
                )
        if tokenizer_sha256(folder / TOKENIZER_FOLDER) != manifest.tokenizer_sha256:
            raise DataError(f"{folder} is damaged: its tokenizer is not the one of its manifest")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("the same dataset is given twice")
    if len({manifest.val_fraction for manifest in manifests}) > 1:
        logger.warning(
            "the datasets held out different shares for validation: "
            "a document that both have may be held out in one and trained on in the other"
        )


def _joined_manifest(
    manifests: Sequence[Manifest], shards: list[ShardInfo], split_indices: dict[Split, IndexInfo]
) -> Manifest:
    first = manifests[0]
    filters = [manifest.filters for manifest in manifests]
    reasons: list[DropReason] = ["short", "long", "duplicate"]
    documents = {split: sum(m.counts[split].documents for m in manifests) for split in SPLITS}
    fractions = {manifest.val_fraction for manifest in manifests}
    return make_manifest(
        kind=first.kind,
        vocab_size=first.vocab_size,
        special_tokens=first.special_tokens,
        tokenizer_sha256=first.tokenizer_sha256,
        max_tokens=_common([manifest.max_tokens for manifest in manifests]),
        split_documents=_common([manifest.split_documents for manifest in manifests]),
        filters=Filters(
            min_tokens=_common([each.min_tokens for each in filters]),
            drop_longer=_common([each.drop_longer for each in filters]),
            # Each without repetitions does not make all of them so.
            dedup=len(filters) == 1 and filters[0].dedup,
            dropped={reason: sum(each.dropped.get(reason, 0) for each in filters) for reason in reasons},
        ),
        val_fraction=fractions.pop() if len(fractions) == 1 else documents["val"] / sum(documents.values()),
        source=[source for manifest in manifests for source in manifest.source],
        shards=shards,
        split_indices=split_indices,
        truncated={split: sum(m.counts[split].truncated for m in manifests) for split in SPLITS},
        pieces={split: sum(m.counts[split].split for m in manifests) for split in SPLITS},
    )


def _common(values: Sequence[int | None]) -> int | None:
    """The value that all have; None when they differ."""
    return values[0] if len(set(values)) == 1 else None
