"""What a dataset holds, from its manifest and indices alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.format import ShardIndex
from rxt_dist.data.manifest import SPLITS, Manifest, Split, load_manifest
from rxt_dist.errors import DataError

PERCENTILES = (0, 10, 50, 90, 99, 100)
_BAR_CHARACTERS = 40

Lengths = dict[str, npt.NDArray[np.int64]]


def dataset_stats(folder: Path) -> dict[str, Any]:
    """Counts, length percentiles and length histograms of every split, as plain data.

    A histogram is a list of ``[smallest length, largest length, how many]``, in powers of two.

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
        "split_documents": manifest.split_documents,
        "filters": manifest.filters.model_dump(),
        "sources": [source.model_dump(exclude={"sha256"}) for source in manifest.source],
        "splits": {split: _split_stats(folder, manifest, split) for split in SPLITS},
        "fingerprint": manifest.fingerprint,
    }


def _split_stats(folder: Path, manifest: Manifest, split: Split) -> dict[str, Any]:
    lengths = split_lengths(folder, manifest, split)
    shards = manifest.shards_of(split)
    return {
        **manifest.counts[split].model_dump(),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "percentiles": {name: _percentiles(values) for name, values in lengths.items()},
        "histograms": {name: histogram(values) for name, values in lengths.items()},
    }


def split_lengths(folder: Path, manifest: Manifest, split: Split) -> Lengths:
    """Every length of interest in a split, by what is measured."""
    indices = [ShardIndex.read(shard.index_path_in(folder)) for shard in manifest.shards_of(split)]

    def joined(arrays: list[npt.NDArray[np.uint32] | None]) -> npt.NDArray[np.int64]:
        parts = [array.astype(np.int64) for array in arrays if array is not None]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    unit = "document" if manifest.kind == "text" else "conversation"
    lengths = {f"tokens_per_{unit}": joined([index.document_tokens for index in indices])}
    if manifest.kind == "conversations":
        lengths["interactions_per_conversation"] = joined([index.interactions for index in indices])
        queries, answers = (
            joined([getattr(index, name) for index in indices]) for name in ("query_tokens", "answer_tokens")
        )
        lengths["tokens_per_interaction"] = queries + answers
    return lengths


def _percentiles(values: npt.NDArray[np.int64]) -> dict[str, int]:
    """Nearest-rank percentiles; empty when there is nothing to count."""
    if not len(values):
        return {}
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def histogram(values: npt.NDArray[np.int64]) -> list[list[int]]:
    """How many positive ``values`` there are in each of [1, 1], [2, 3], [4, 7], ...: from the first range
    that has some to the last."""
    if not len(values):
        return []
    exponents = np.frexp(values)[1] - 1  # exact: floor of the logarithm
    counts = np.bincount(exponents)
    first = int(exponents.min())
    return [[1 << e, (2 << e) - 1, int(counts[e])] for e in range(first, len(counts))]


def format_stats(stats: dict[str, Any]) -> str:
    """The same as a text for people."""
    special = ("splits", "sources", "filters")
    lines = [f"{key}: {value}" for key, value in stats.items() if key not in special]
    filters = dict(stats["filters"])
    dropped = [f"{count:,} {reason}" for reason, count in filters.pop("dropped").items() if count]
    lines.append(
        f"filters: {', '.join(f'{key} {value}' for key, value in filters.items() if value) or 'none'}"
    )
    lines.append(f"dropped: {', '.join(dropped) or 'none'}")
    lines.append("sources:")
    for source in stats["sources"]:
        lines.append(
            f"  {source['name']}: {source['records']:,} records, {source['documents']:,} documents, "
            f"{source['tokens']:,} tokens"
        )
    for split, values in stats["splits"].items():
        lines.append(f"{split}:")
        lines += [
            f"  {key}: {value:,}" for key, value in values.items() if key not in ("percentiles", "histograms")
        ]
        for name, percentiles in values["percentiles"].items():
            if not percentiles:
                continue
            row = "  ".join(f"{percent} {length:,}" for percent, length in percentiles.items())
            lines.append(f"  {name}: {row}")
            lines += _bars(values["histograms"][name])
    return "\n".join(lines)


def _bars(rows: list[list[int]]) -> list[str]:
    most = max((count for _, _, count in rows), default=0)
    lines = []
    for low, high, count in rows:
        bar = "#" * -(-count * _BAR_CHARACTERS // most)
        span = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        lines.append(f"    {span:>19} {count:>12,} {bar}".rstrip())
    return lines


def draw_stats(stats: dict[str, Any], path: Path) -> None:
    """Draw the histograms into the PNG file ``path``.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("drawing needs matplotlib: pip install rxt-dist[monitoring]") from error
    names = list(stats["splits"]["train"]["histograms"])
    figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for split, values in stats["splits"].items():
            rows = values["histograms"][name]
            if rows:
                edges = [*(low for low, _, _ in rows), rows[-1][1] + 1]
                axes.stairs([count for _, _, count in rows], edges, label=split, fill=split == "train")
        axes.set(xscale="log", yscale="log", xlabel=name.replace("_", " "), ylabel="how many")
        axes.legend()
    figure.suptitle(stats["dataset_id"])
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
