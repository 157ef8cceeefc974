"""Speed of the data path in one thread: reading, packing plus batching, planning order and lanes.

    python -m benchmarks.data [--tokens 20000000] [--folder /fast/disk]
    python -m benchmarks.data --documents 100000000 [--shards 1000]
    python -m benchmarks.data --start [--shards 100000]

Synthetic datasets are built in a temporary folder: documents of about 1,024 tokens, conversations of 5
interactions of about 20 tokens, and the same with about 50. Rates are by seconds of CPU, the best of
--repeats runs with a warm page cache, except "first read", which includes the check and decoding of every
block.

With --documents it measures size instead of speed: memory and start of a dataset of so many documents, whose
shards are links to a few real ones. With --start it measures what the start of a run spends on data until the
first batch of a text and of a memory stage, resumed in the middle of their data, with two datasets of so many
shards each.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rxt_dist.config import RunConfig, load_config
from rxt_dist.data.batch import MaskPlan, build_text_batch, count_pack
from rxt_dist.data.format import ConversationTokens, Kind, ShardWriter, token_dtype
from rxt_dist.data.index import write_split_indices
from rxt_dist.data.lanes import LaneSchedule, LaneState
from rxt_dist.data.loader import TextLoader
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    ShardInfo,
    SplitCounts,
    fingerprint_of,
    write_manifest,
)
from rxt_dist.data.mixing import MixCursor
from rxt_dist.data.order import PackCursor, PackStream
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.data.tokens import NEEDED_TOKENS
from rxt_dist.parallel.bootstrap import world_from_environment
from rxt_dist.stages import dataset_store, open_pieces
from rxt_dist.train.datasets import check_splits, open_datasets, resolve
from rxt_dist.train.feed import DataState, open_feed

VOCAB = 32_000
SEQ_LEN = 2048
INTERACTIONS = 5
_LINKS = 30_000  # a file system allows about 65,000 links to a file


def documents(tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Documents of 512..1,536 tokens."""
    lengths = rng.integers(512, 1537, tokens // 1024)
    return [rng.integers(7, VOCAB, n) for n in lengths]


def conversations(tokens: int, rng: np.random.Generator, mean: int = 20) -> list[ConversationTokens]:
    """Conversations of 5 interactions of ``mean`` tokens on average."""
    count = tokens // (mean * INTERACTIONS)
    lengths = rng.integers(mean // 2 - 4, mean // 2 + 5, (count, 2 * INTERACTIONS))
    return [
        ConversationTokens([rng.integers(7, VOCAB, n) for n in row], [1, 2] * INTERACTIONS) for row in lengths
    ]


def write_dataset(
    folder: Path,
    kind: Kind,
    items: Sequence[np.ndarray | ConversationTokens],
    *,
    vocab_size: int = VOCAB,
    special_tokens: Mapping[str, int] | None = None,
) -> Path:
    """Write ``items`` as the train split, in at most 8 shards, and return ``folder``."""
    (folder / "train").mkdir(parents=True)
    shards: list[ShardInfo] = []
    dtype = token_dtype(vocab_size)
    size = -(-len(items) // 8)
    for number in range(-(-len(items) // size)):
        path = folder / "train" / f"rxt-train-{number:06d}.tar"
        with ShardWriter(path, kind, dtype, number) as writer:
            for item in items[number * size : (number + 1) * size]:
                writer.add(item)
            shards.append(writer.close())
    return finish_dataset(folder, kind, shards, vocab_size, special_tokens)


def finish_dataset(
    folder: Path,
    kind: Kind,
    shards: list[ShardInfo],
    vocab_size: int = VOCAB,
    special_tokens: Mapping[str, int] | None = None,
) -> Path:
    """Write the manifest of ``shards``, which form the train split, and return ``folder``."""
    names = ("documents", "conversations", "interactions", "tokens")
    counts = {}
    for split in {shard.split for shard in shards}:
        here = [shard for shard in shards if shard.split == split]
        totals = {name: sum(getattr(shard, name) for shard in here) for name in names}
        counts[split] = SplitCounts(truncated=0, **totals)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dataset_id="benchmark",
        kind=kind,
        created_by="benchmarks.data",
        dtype="uint16" if token_dtype(vocab_size).itemsize == 2 else "uint32",
        byte_order="little",
        vocab_size=vocab_size,
        special_tokens=dict(special_tokens or {}),
        tokenizer_sha256="0" * 64,
        val_fraction=0.0,
        source=[],
        counts=counts,
        shards=shards,
        split_indices=write_split_indices(folder, shards),
        fingerprint="0" * 64,
    )
    write_manifest(folder, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))
    return folder


def seconds(work: Callable[[], object]) -> float:
    """Seconds of CPU of one call, which other work of the machine hardly changes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def bench_source(
    source: TextPieces | InteractionPieces, pack_tokens: int, repeats: int
) -> list[tuple[str, float]]:
    """Rates of one dataset in tokens a second."""
    stream = PackStream(source.lengths, key=1, pack_tokens=pack_tokens)
    plan, packs, cursor = MaskPlan(1, 0.15), [], PackCursor()
    while cursor.epoch == 0:
        pack, cursor = stream.next_pack(cursor)
        packs.append(pack)
    total = sum(int(source.lengths[p.pieces].sum()) for p in packs)

    def read() -> None:
        for pack in packs:
            source.read_tokens(pack.pieces)

    def batch() -> None:
        place = PackCursor()
        for _ in packs:
            pack, place = stream.next_pack(place)
            count_pack(source, pack, plan)
            build_text_batch(source, pack, plan, mask_id=4)

    def count() -> None:
        for pack in packs:
            count_pack(source, pack, plan)

    first = seconds(read)
    works = {"read again": read, "pack + count + batch": batch, "global counts only": count}
    rates = {name: total / min(seconds(work) for _ in range(repeats)) for name, work in works.items()}
    return [("first read (crc, decode)", total / first), *rates.items()]


def bench_order(pieces: int, repeats: int) -> float:
    """Pieces a second of planning one whole epoch, permutation included."""
    lengths = np.random.default_rng(0).integers(1, 1025, pieces)

    def epoch() -> None:
        stream, cursor = PackStream(lengths, key=1, pack_tokens=16_384), PackCursor()
        while cursor.epoch == 0:
            _, cursor = stream.next_pack(cursor)

    # The last pack runs over into epoch 1, so two permutations are made for one epoch of packs.
    return pieces / min(seconds(epoch) for _ in range(repeats))


def bench_lanes(conversations: int, lanes: int, repeats: int, weights: Sequence[int] = (1,)) -> float:
    """Conversations a second of the lane schedule, in windows of 4 positions, of 1..9
    interactions each, in as many datasets of one size as there are ``weights``."""
    counts = np.random.default_rng(0).integers(1, 10, conversations)
    windows = int(counts.sum()) // (4 * lanes)
    sizes = [len(part) for part in np.array_split(counts, len(weights))]

    def epoch() -> None:
        schedule = LaneSchedule(counts, key=1, lanes=lanes, sizes=sizes, weights=weights)
        state = LaneState.initial(lanes, len(weights))
        for _ in range(windows):
            _, state = schedule.next_window(state, 4)

    return conversations / min(seconds(epoch) for _ in range(repeats))


def linked_dataset(
    folder: Path,
    items: Sequence[np.ndarray | ConversationTokens],
    shards: int,
    *,
    kind: Kind = "text",
    val_shards: int = 0,
    special_tokens: Mapping[str, int] | None = None,
) -> Path:
    """A dataset in which every shard has the content ``items``: links to a few real ones."""
    infos: list[ShardInfo] = []
    for split, count in (("train", shards), ("val", val_shards)):
        (folder / split).mkdir(parents=True)
        names = [f"rxt-{split}-{number:06d}" for number in range(count)]
        for number, name in enumerate(names):
            if number == 0:
                path = folder / split / f"{name}.tar"
                with ShardWriter(path, kind, token_dtype(VOCAB), 0) as writer:
                    for item in items:
                        writer.add(item)
                    first = writer.close()
                original = name
            fresh = number and number % _LINKS == 0
            for suffix in (".tar", ".idx") if number else ():
                source, target = (folder / split / (n + suffix) for n in (original, name))
                (shutil.copyfile if fresh else os.link)(source, target)
            original = name if fresh else original
            infos.append(first.model_copy(update={"name": f"{name}.tar"}))
    return finish_dataset(folder, kind, infos, special_tokens=special_tokens)


def run_of(text: Path, talk: Path, cache: Path | None) -> RunConfig:
    """A run of a text and a memory stage over these datasets."""
    settings = {
        "data.text": text,
        "data.conversations": talk,
        "data.cache_dir": cache or "null",
        "stages": "[{name: joint_lm, steps: 9}, {name: smat, steps: 9}]",
        "model.seq_len": SEQ_LEN,
        "batch.packs": 16,
        "batch.pack_tokens": 16_384,
        "batch.lanes": 64,
        "batch.window": 4,
        "runtime.run_dir": "unused",
    }
    return load_config("tiny", [f"{name}={value}" for name, value in settings.items()])


def start_run(
    config: RunConfig, states: Mapping[str, DataState]
) -> tuple[dict[str, tuple[float, float]], dict[str, DataState]]:
    """Seconds, and those of CPU, of what a run does with its data before the first step of each stage, which
    goes on from ``states``; and the states after it."""
    times: dict[str, tuple[float, float]] = {}
    started, worked = time.perf_counter(), time.process_time()

    def note(what: str) -> None:
        times[what] = time.perf_counter() - started, time.process_time() - worked

    store = dataset_store(config)
    opened = open_datasets(config, store)
    note("manifests")
    config = resolve(config, opened)
    check_splits(config, store)
    note("and indices")
    after: dict[str, DataState] = {}
    for number, stage in enumerate(config.stages):
        source = open_pieces(config, stage, "train", store)
        open_pieces(config, stage, "val", store)
        world = world_from_environment()
        with open_feed(config, stage, number, source, world, states.get(stage.name)) as feed:
            after[stage.name] = feed.next_step().state
        note(f"and the first batch of {stage.name}")
    return times, after


def bench_start(folder: Path, shards: int) -> list[tuple[str, str]]:
    """The start of a run over two datasets of ``shards`` shards each, without and with a cache."""
    rng = np.random.default_rng(0)
    special = {name: number for number, name in enumerate(NEEDED_TOKENS)}
    options = {"val_shards": max(1, shards // 100), "special_tokens": special}
    text = linked_dataset(folder / "text", documents(64 * 1024, rng), shards, **options)
    talks = conversations(64 * 50, rng, 50)
    talk = linked_dataset(folder / "talk", talks, shards, kind="conversations", **options)
    rows = []
    _, states = start_run(run_of(text, talk, None), {})
    for name, cache in (
        ("without data.cache_dir", None),
        ("with it, first time", folder / "cache"),
        ("with it, from then on", folder / "cache"),
    ):
        times, _ = start_run(run_of(text, talk, cache), states)
        rows += [
            (f"{name}: {part}", f"{wall:.2f} s ({cpu:.2f} s of CPU)") for part, (wall, cpu) in times.items()
        ]
    return rows


def bench_size(folder: Path, count: int, shards: int) -> list[tuple[str, str]]:
    """Memory and start-up of a dataset of ``count`` documents in ``shards`` shards."""
    content = documents(1024 * -(-count // shards), np.random.default_rng(0))
    linked_dataset(folder, content, shards)
    before = _resident()
    start, worked = time.perf_counter(), time.process_time()
    source = TextPieces(Dataset(folder, "train"), SEQ_LEN)
    opened, worked = time.perf_counter() - start, time.process_time() - worked
    held = _resident() - before
    middle = MixCursor(10**6, (PackCursor(2, len(source.lengths) // 2),))
    options = {"packs": 16, "pack_tokens": 16_384, "micro_packs": 16, "dp_rank": 0, "dp_size": 1}
    start = time.perf_counter()
    with TextLoader(
        source, key=1, masking_probability=0.15, mask_id=4, cursor=middle, prefetch_steps=1, **options
    ) as loader:
        next(loader)
        first = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    found = len(source.lengths)
    return [
        ("manifest and index", f"{opened:.2f} s ({worked:.2f} s of CPU)"),
        ("first batch of 16 packs after that, in the middle of an epoch", f"{first:.2f} s"),
        ("memory held", f"{held / found:.1f} bytes a document ({held / 1e6:,.0f} MB)"),
        ("highest while opening and loading", f"{peak / found:.1f} bytes a document ({peak / 1e6:,.0f} MB)"),
    ]


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Build the datasets, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of each dataset")
    parser.add_argument("--pieces", type=int, default=2_000_000, help="pieces of the planned order")
    parser.add_argument("--pack-tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=float, help="measure a dataset of so many documents instead")
    parser.add_argument("--start", action="store_true", help="measure the start of a run instead")
    parser.add_argument("--shards", type=float, default=1000, help="shards of such a dataset")
    parser.add_argument("--folder", type=Path, help="where the temporary datasets are written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.start:
        print(f"two datasets of {int(arguments.shards):,} shards each")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            for name, value in bench_start(Path(temporary), int(arguments.shards)):
                print(f"{name:64}{value}")
        return
    if arguments.documents is not None:
        count, shards = int(arguments.documents), int(arguments.shards)
        print(f"{count:,} documents in {shards:,} shards")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            for name, value in bench_size(Path(temporary) / "linked", count, shards):
                print(f"{name:64}{value}")
        return
    rng = np.random.default_rng(0)
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, one thread"
    )
    print(f"{arguments.tokens:,} tokens a dataset, packs of {arguments.pack_tokens:,} tokens\n")
    print(f"{'data':28}{'work':30}{'rate':>12}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        text = write_dataset(Path(temporary) / "text", "text", documents(arguments.tokens, rng))
        sources: list[tuple[str, TextPieces | InteractionPieces]] = [
            ("documents of ~1,024 tokens", TextPieces(Dataset(text, "train"), SEQ_LEN))
        ]
        for mean in (50, 20):
            talks = conversations(arguments.tokens, rng, mean)
            talk = write_dataset(Path(temporary) / f"talk{mean}", "conversations", talks)
            pieces = InteractionPieces(Dataset(talk, "train"), SEQ_LEN)
            sources.append((f"interactions of ~{mean} tokens", pieces))
        for name, source in sources:
            for work, rate in bench_source(source, arguments.pack_tokens, arguments.repeats):
                print(f"{name:28}{work:30}{rate / 1e6:>8.1f} M tokens/s")
    for lanes, weights in ((64, (1,)), (1024, (1,)), (64, (5, 3, 2)), (1024, (5, 3, 2))):
        rate = bench_lanes(arguments.pieces // 4, lanes, arguments.repeats, weights)
        name = f"{arguments.pieces // 4:,} conversations"
        work = f"{lanes} lanes" if len(weights) == 1 else f"{lanes} lanes, {len(weights)} datasets"
        print(f"{name:28}{work:30}{rate / 1e6:>8.1f} M conversations/s")
    rate = bench_order(arguments.pieces, arguments.repeats)
    print(
        f"{f'{arguments.pieces:,} pieces':28}{'order and packs of an epoch':30}{rate / 1e6:>8.1f} M pieces/s"
    )


if __name__ == "__main__":
    main()
