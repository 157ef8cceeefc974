"""What a dataset holds, from its manifest and indices alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.format import ShardIndex
from rxt_dist.data.manifest import SPLITS, Manifest, Split, load_manifest

PERCENTILES = (0, 10, 50, 90, 99, 100)


def dataset_stats(folder: Path) -> dict[str, Any]:
    """Counts and length percentiles of every split, as plain data.

    Raises:
        DataError: the manifest or an index is missing or damaged.
    """
    manifest = load_manifest(folder)
    return {
        "dataset_id": manifest.dataset_id,
        "kind": manifest.kind,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "max_tokens": manifest.max_tokens,
        "splits": {split: _split_stats(folder, manifest, split) for split in SPLITS},
        "fingerprint": manifest.fingerprint,
    }


def _split_stats(folder: Path, manifest: Manifest, split: Split) -> dict[str, Any]:
    shards = manifest.shards_of(split)
    indices = [ShardIndex.read(shard.index_path_in(folder)) for shard in shards]
    unit = "document" if manifest.kind == "text" else "conversation"
    lengths = {f"tokens_per_{unit}": [index.document_tokens for index in indices]}
    if manifest.kind == "conversations":
        lengths["interactions_per_conversation"] = [
            index.interactions for index in indices if index.interactions is not None
        ]
        lengths["tokens_per_interaction"] = [
            index.query_tokens + index.answer_tokens
            for index in indices
            if index.query_tokens is not None and index.answer_tokens is not None
        ]
    return {
        **manifest.counts[split].model_dump(),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "percentiles": {name: _percentiles(arrays) for name, arrays in lengths.items()},
    }


def _percentiles(arrays: list[npt.NDArray[np.uint32]]) -> dict[str, int]:
    """Nearest-rank percentiles; empty when there is nothing to count."""
    if not arrays:
        return {}
    values = np.percentile(np.concatenate(arrays), PERCENTILES, method="inverted_cdf")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def format_stats(stats: dict[str, Any]) -> str:
    """The same as a text for people."""
    lines = [f"{key}: {value}" for key, value in stats.items() if key != "splits"]
    for split, values in stats["splits"].items():
        lines.append(f"{split}:")
        lines += [f"  {key}: {value:,}" for key, value in values.items() if key != "percentiles"]
        for name, percentiles in values["percentiles"].items():
            row = "  ".join(f"{percent} {length:,}" for percent, length in percentiles.items())
            lines.append(f"  {name}: {row}")
    return "\n".join(lines)
