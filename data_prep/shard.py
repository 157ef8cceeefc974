"""Building a dataset: tokenise parts of the input in parallel, decide, write shards in order, publish.

The output is a function of the inputs and the options only: parts are consecutive records, whatever
process encoded them and however large they are, and nothing records a time, a path or the number of
workers. What is finished stays on the disk (see :mod:`data_prep.work`), so a killed build goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.describe import make_manifest
from data_prep.encode import MIN_MAX_TOKENS, EncodeOptions, Encoder, vocabulary_size
from data_prep.inputs import InputReader, RawPart
from data_prep.parts import PartCounts, StoredPart, start_worker, write_part, write_part_in_worker
from data_prep.plan import Plan, make_plan
from data_prep.progress import progress_bar
from data_prep.sources import Source, resolve_inputs
from data_prep.split_writer import DEFAULT_SHARD_BYTES, MIN_SHARD_BYTES, SplitWriter
from data_prep.work import WorkFolder
from rxt_dist.data.blocks import select_documents, slice_documents
from rxt_dist.data.cutter import BLOCK_DOCUMENTS
from rxt_dist.data.format import Kind, token_dtype
from rxt_dist.data.index import write_split_indices
from rxt_dist.data.manifest import (
    SPLITS,
    TOKENIZER_FOLDER,
    Filters,
    Manifest,
    ShardInfo,
    SourceInfo,
    Split,
    load_manifest,
    write_manifest,
)
from rxt_dist.data.tokens import TOKENIZER_FILE, load_tokenizer, special_ids, tokenizer_sha256
from rxt_dist.errors import DataError

DEFAULT_PART_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """What to build; every field is checked by :func:`build_dataset`."""

    kind: Kind
    inputs: Sequence[str | Path]
    """See :mod:`data_prep.sources`."""
    tokenizer: Path
    """Folder that holds tokenizer.json."""
    output: Path
    workers: int = 1
    val_fraction: float = 0.01
    max_tokens: int | None = None
    split_documents: int | None = None
    min_tokens: int | None = None
    drop_longer: int | None = None
    dedup: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    block_documents: int = BLOCK_DOCUMENTS
    part_bytes: int = DEFAULT_PART_BYTES
    """Input that a worker encodes at once; the dataset does not depend on it."""

    def check(self) -> None:
        """Raise :class:`DataError` for a value out of range."""
        limits = (
            ("--workers", self.workers, 1),
            ("--shard-bytes", self.shard_bytes, MIN_SHARD_BYTES),
            ("--block-documents", self.block_documents, 1),
            ("--max-tokens", self.max_tokens, MIN_MAX_TOKENS),
            ("--split-documents", self.split_documents, MIN_MAX_TOKENS),
            ("--min-tokens", self.min_tokens, 1),
            ("--drop-longer", self.drop_longer, self.min_tokens or 1),
        )
        for name, value, minimum in limits:
            if value is not None and value < minimum:
                raise DataError(f"{name} is {value}; it must be at least {minimum}")
        if not 0.0 <= self.val_fraction < 1.0:
            raise DataError(f"--val-fraction is {self.val_fraction}; it must be at least 0 and below 1")
        if self.split_documents is not None and self.kind != "text":
            raise DataError(
                "--split-documents is for text; an interaction cannot be split (see --max-tokens)"
            )
        if self.split_documents is not None and self.max_tokens is not None:
            raise DataError("--split-documents and --max-tokens exclude each other: give one of them")
        longest = self.split_documents or (self.max_tokens if self.kind == "text" else None)
        if self.min_tokens is not None and longest is not None and self.min_tokens > longest:
            raise DataError(
                f"--min-tokens is {self.min_tokens} but documents have at most {longest}: none would be left"
            )

    def encode_options(self) -> EncodeOptions:
        """The part of the options that workers need."""
        return EncodeOptions(
            tokenizer=self.tokenizer,
            kind=self.kind,
            max_tokens=self.max_tokens,
            split_documents=self.split_documents,
            min_tokens=self.min_tokens,
            drop_longer=self.drop_longer,
            dedup=self.dedup,
        )

    def identity(self) -> dict[str, Any]:
        """All that determines the work on the inputs, as JSON values named like the options."""
        encode = asdict(self.encode_options())
        del encode["tokenizer"]
        values = {
            **encode,
            "val_fraction": self.val_fraction,
            "shard_bytes": self.shard_bytes,
            "block_documents": self.block_documents,
            "part_bytes": self.part_bytes,
            "tokenizer": tokenizer_sha256(self.tokenizer),
        }
        return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def build_dataset(options: ShardOptions) -> Manifest:
    """Build the dataset and return its manifest; goes on where a killed build with these options was.

    Raises:
        DataError: an option, an input record, the tokenizer, the output folder or the work folder of an
            earlier build is not usable.
    """
    options.check()
    sources = resolve_inputs(options.inputs)
    special_ids(load_tokenizer(options.tokenizer))
    with WorkFolder(options.output, options.identity(), sources) as work:
        if work.published:
            return load_manifest(options.output)
        parts = work.total_parts
        if parts is None:
            parts = _tokenise(options, sources, work)
        manifest = _assemble(options, sources, work, [work.part_path(number) for number in range(parts)])
        write_manifest(work.dataset, manifest)
        work.publish()
    return manifest


class _Submit(Protocol):
    def __call__(self, raw: RawPart, path: Path) -> Future[PartCounts]: ...


def _tokenise(options: ShardOptions, sources: list[Source], work: WorkFolder) -> int:
    """Write all parts that are not there yet; returns how many there are."""
    first, start = work.resume_point()
    reader = InputReader(sources, work.downloads, work)
    pending: deque[tuple[Future[PartCounts], int]] = deque()
    count, tokens = first, 0
    sizes = sum(source.bytes for source in sources)
    with progress_bar("tokenising", "B", total=sizes or None) as bar, _executor(options) as submit:

        def wait() -> None:
            nonlocal tokens
            future, position = pending.popleft()
            tokens += future.result().tokens
            bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)
            bar.update(position - bar.n)

        for raw in reader.parts(options.part_bytes, first, start):
            count = raw.number + 1
            path = work.part_path(raw.number)
            if not path.is_file():  # a killed build may have finished later parts before earlier ones
                pending.append((submit(raw, path), reader.bytes_read))
            while len(pending) > 2 * options.workers:
                wait()
        while pending:
            wait()
    work.finish_parts(count)
    return count


@contextmanager
def _executor(options: ShardOptions) -> Iterator[_Submit]:
    """Something that encodes parts: this process if it is to be the only one, else worker processes."""
    if options.workers == 1:
        encoder = Encoder(options.encode_options())

        def at_once(raw: RawPart, path: Path) -> Future[PartCounts]:
            future: Future[PartCounts] = Future()
            future.set_result(write_part(encoder, raw, path))
            return future

        yield at_once
        return
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(options.encode_options(),),
    )
    try:
        yield lambda raw, path: pool.submit(write_part_in_worker, raw, path)
    except BrokenProcessPool as error:
        if sys.version_info < (3, 11, 5):
            # The thread that feeds the workers waits for room in their pipe, which nobody reads any more
            # (https://github.com/python/cpython/issues/94777).
            pool._call_queue._reader.close()  # type: ignore[attr-defined]
        raise DataError(
            "a worker process ended unexpectedly (killed, or out of memory); try fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _assemble(options: ShardOptions, sources: list[Source], work: WorkFolder, parts: list[Path]) -> Manifest:
    """Write the shards that are not there yet from the parts."""
    plan = make_plan(parts, len(sources), options.val_fraction, options.dedup)
    if plan.documents == 0:
        names = ", ".join(source.shown for source in sources)
        what = "every record was dropped" if any(plan.dropped.values()) else "no record"
        raise DataError(f"the corpus is empty: {what} in {names}")
    work.dataset.mkdir(exist_ok=True)
    shards: list[ShardInfo] = []
    with progress_bar("writing", "document", total=plan.documents) as bar:
        for split in SPLITS:
            shards += _write_split(options, work, plan, split, parts, bar.update)
    tokenizer = work.dataset / TOKENIZER_FOLDER
    tokenizer.mkdir(exist_ok=True)
    shutil.copyfile(options.tokenizer / TOKENIZER_FILE, tokenizer / TOKENIZER_FILE)
    return _manifest(options, sources, work, plan, shards)


def _write_split(
    options: ShardOptions, work: WorkFolder, plan: Plan, split: Split, parts: list[Path], report: Any
) -> list[ShardInfo]:
    finished = work.finished_shards(split)
    written = finished[-1].documents if finished else 0

    def on_shard(info: ShardInfo) -> None:
        nonlocal written
        written += info.documents
        work.finish_shard(info, written)

    dtype = token_dtype(vocabulary_size(load_tokenizer(options.tokenizer)))
    writer = SplitWriter(
        work.dataset,
        split,
        options.kind,
        dtype,
        shard_bytes=options.shard_bytes,
        block_documents=options.block_documents,
        finished=[state.info for state in finished],
        on_shard=on_shard,
    )
    skip = written
    with writer:
        for number, path in enumerate(parts):
            members = plan.members(number, split)
            count = int(members.sum())
            report(count)
            if count <= skip:
                skip -= count
                continue
            with StoredPart(path) as part:
                block = part.block(options.kind, dtype)
            assert block is not None
            chosen = select_documents(block, members)
            writer.add(slice_documents(chosen, skip, count) if skip else chosen)
            skip = 0
    return writer.shards


def _manifest(
    options: ShardOptions, sources: list[Source], work: WorkFolder, plan: Plan, shards: list[ShardInfo]
) -> Manifest:
    infos = []
    for number, source in enumerate(sources):
        state = work.source(number)
        infos.append(
            SourceInfo(
                name=source.name,
                sha256=state.sha256,
                bytes=state.bytes,
                records=int(plan.sources.records[number]),
                documents=int(plan.sources.documents[number]),
                tokens=int(plan.sources.tokens[number]),
            )
        )
    tokenizer = load_tokenizer(options.tokenizer)
    return make_manifest(
        kind=options.kind,
        vocab_size=vocabulary_size(tokenizer),
        special_tokens=special_ids(tokenizer),
        tokenizer_sha256=tokenizer_sha256(options.tokenizer),
        max_tokens=options.max_tokens,
        split_documents=options.split_documents,
        filters=Filters(
            min_tokens=options.min_tokens,
            drop_longer=options.drop_longer,
            dedup=options.dedup,
            dropped=plan.dropped,
        ),
        val_fraction=options.val_fraction,
        source=infos,
        shards=shards,
        split_indices=write_split_indices(work.dataset, shards),
        truncated=plan.truncated,
        pieces=plan.pieces,
    )


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
