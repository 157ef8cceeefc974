"""Building a dataset: tokenise in parallel, write in order, publish by one rename.

The output is a function of the inputs and the options only: chunks are consumed in the order of the input,
whatever process encoded them, and nothing records a time, a path or the number of workers.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import (
    MIN_MAX_TOKENS,
    EncodedChunk,
    EncodeOptions,
    Encoder,
    encode_in_worker,
    start_worker,
    vocabulary_size,
)
from data_prep.inputs import check_inputs, describe_sources, read_chunks
from data_prep.output import OutputFolder
from data_prep.progress import progress_bar
from rxt_dist import __version__
from rxt_dist.data.format import (
    ConversationTokens,
    Kind,
    ShardWriter,
    decode_conversation_block,
    decode_text_block,
    token_dtype,
)
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    ShardInfo,
    Split,
    SplitCounts,
    compute_fingerprint,
    write_manifest,
)
from rxt_dist.data.tokens import TOKENIZER_FILE, load_tokenizer, special_ids, tokenizer_sha256
from rxt_dist.errors import DataError

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 256 << 20
MIN_SHARD_BYTES = 10240  # the smallest tar


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """What to build; every field is checked by :func:`build_dataset`."""

    kind: Kind
    inputs: Sequence[Path]
    tokenizer: Path
    """Folder that holds tokenizer.json."""
    output: Path
    workers: int = 1
    val_fraction: float = 0.01
    max_tokens: int | None = None
    split_documents: int | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    block_documents: int = 64

    def check(self) -> None:
        """Raise :class:`DataError` for a value out of range."""
        limits = (
            ("--workers", self.workers, 1),
            ("--shard-bytes", self.shard_bytes, MIN_SHARD_BYTES),
            ("--block-documents", self.block_documents, 1),
            ("--max-tokens", self.max_tokens, MIN_MAX_TOKENS),
            ("--split-documents", self.split_documents, MIN_MAX_TOKENS),
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

    def encode_options(self) -> EncodeOptions:
        """The part of the options that workers need."""
        return EncodeOptions(self.tokenizer, self.kind, self.max_tokens, self.split_documents)


def build_dataset(options: ShardOptions) -> Manifest:
    """Build the dataset and return its manifest; on any failure nothing is left behind.

    Raises:
        DataError: an option, an input record, the tokenizer or the output folder is not usable.
    """
    options.check()
    check_inputs(options.inputs)
    special_ids(load_tokenizer(options.tokenizer))
    with OutputFolder(options.output) as folder:
        outcome = _write_shards(options, folder, forced={})
        forced = outcome.repair(options.val_fraction)
        if forced:
            for split in SPLITS:
                shutil.rmtree(folder / split, ignore_errors=True)
            outcome = _write_shards(options, folder, forced)
        (folder / TOKENIZER_FOLDER).mkdir()
        shutil.copyfile(options.tokenizer / TOKENIZER_FILE, folder / TOKENIZER_FOLDER / TOKENIZER_FILE)
        manifest = _manifest(options, outcome, folder / TOKENIZER_FOLDER)
        write_manifest(folder, manifest)
    return manifest


@dataclass
class _Extreme:
    """The document with the smallest and the one with the largest hash."""

    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    def see(self, digest: int, document: int) -> None:
        if self.smallest is None or digest < self.smallest[0]:
            self.smallest = (digest, document)
        if self.largest is None or digest > self.largest[0]:
            self.largest = (digest, document)


@dataclass
class _Outcome:
    """What was written."""

    shards: list[ShardInfo] = field(default_factory=list)
    documents: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    truncated: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    pieces: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    extreme: _Extreme = field(default_factory=_Extreme)

    def repair(self, val_fraction: float) -> dict[int, Split]:
        """Documents to move so that a small corpus has something in both splits: ordinal -> split.

        A validation split that was asked for and stayed empty gets the document with the smallest hash; an
        empty training split gets the one with the largest.
        """
        total = sum(self.documents.values())
        assert self.extreme.smallest is not None
        assert self.extreme.largest is not None
        if self.documents["train"] == 0:
            return {self.extreme.largest[1]: "train"}
        if self.documents["val"] == 0 and val_fraction > 0 and total >= 2:
            return {self.extreme.smallest[1]: "val"}
        return {}


class _SplitWriter:
    """The shards of one split, begun when the first document comes and when a shard is full."""

    def __init__(self, options: ShardOptions, folder: Path, split: Split, dtype: np.dtype[Any]) -> None:
        self._options, self._folder, self._split, self._dtype = options, folder / split, split, dtype
        self._writer: ShardWriter | None = None
        self.shards: list[ShardInfo] = []

    def add(self, document: Any) -> None:
        if self._writer is not None and self._writer.bytes_written >= self._options.shard_bytes:
            self.finish()
        if self._writer is None:
            self._folder.mkdir(exist_ok=True)
            number = len(self.shards)
            path = self._folder / f"rxt-{self._split}-{number:06d}.tar"
            self._writer = ShardWriter(
                path, self._options.kind, self._dtype, number, self._options.block_documents
            )
        self._writer.add(document)

    def finish(self) -> None:
        if self._writer is not None:
            self.shards.append(self._writer.close())
            self._writer = None

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()


def _write_shards(options: ShardOptions, folder: Path, forced: Mapping[int, Split]) -> _Outcome:
    dtype = token_dtype(vocabulary_size(load_tokenizer(options.tokenizer)))
    writers = {split: _SplitWriter(options, folder, split, dtype) for split in SPLITS}
    outcome = _Outcome()
    threshold = int(options.val_fraction * 2.0**64)
    ordinal = 0
    try:
        with progress_bar("sharding", "document") as bar:
            for chunk in _encoded_chunks(options):
                for i, document in enumerate(_documents(options.kind, chunk, dtype)):
                    digest = chunk.hashes[i]
                    by_hash: Split = "val" if digest < threshold else "train"
                    split = forced.get(ordinal, by_hash)
                    writers[split].add(document)
                    outcome.extreme.see(digest, ordinal)
                    outcome.documents[split] += 1
                    outcome.truncated[split] += chunk.truncated[i]
                    outcome.pieces[split] += chunk.split[i]
                    ordinal += 1
                bar.update(len(chunk.hashes))
        if ordinal == 0:
            names = ", ".join(str(path) for path in options.inputs)
            raise DataError(f"the corpus is empty: no record in {names}")
        for split in SPLITS:
            writers[split].finish()
            outcome.shards += writers[split].shards
    finally:
        for writer in writers.values():
            writer.abort()
    return outcome


def _documents(kind: Kind, chunk: EncodedChunk, dtype: np.dtype[Any]) -> Iterator[Any]:
    decode = decode_text_block if kind == "text" else decode_conversation_block
    block = decode(chunk.members, dtype)
    for i in range(len(chunk.hashes)):
        document = block.document(i)
        if isinstance(document, ConversationTokens) and not _is_marked(document):
            document = ConversationTokens(document.segments, document.roles)
        yield document


def _is_marked(conversation: ConversationTokens) -> bool:
    """A chunk carries marks for all of its conversations as soon as one of them has any."""
    return conversation.marks is not None and any(marks.any() for marks in conversation.marks)


def _encoded_chunks(options: ShardOptions) -> Iterator[EncodedChunk]:
    """Encoded chunks in input order; a bounded number is under way."""
    if options.workers == 1:
        encoder = Encoder(options.encode_options())
        for chunk in read_chunks(options.inputs):
            yield encoder.encode(chunk)
        return
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(options.encode_options(),),
    )
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in read_chunks(options.inputs):
            pending.append(pool.submit(encode_in_worker, chunk))
            if len(pending) > 3 * options.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended unexpectedly (killed, or out of memory); try fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _manifest(options: ShardOptions, outcome: _Outcome, tokenizer_folder: Path) -> Manifest:
    tokenizer = load_tokenizer(tokenizer_folder)
    vocab_size = vocabulary_size(tokenizer)
    dtype = token_dtype(vocab_size).name
    assert dtype in ("uint16", "uint32")
    ids, digest = special_ids(tokenizer), tokenizer_sha256(tokenizer_folder)
    fingerprint = compute_fingerprint(
        kind=options.kind,
        dtype=dtype,
        vocab_size=vocab_size,
        special_tokens=ids,
        tokenizer_sha256=digest,
        shards=outcome.shards,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        dataset_id=f"{options.kind}-{fingerprint[:16]}",
        kind=options.kind,
        created_by=f"rxt-data {__version__}",
        dtype="uint16" if dtype == "uint16" else "uint32",
        byte_order="little",
        vocab_size=vocab_size,
        special_tokens=ids,
        tokenizer_sha256=digest,
        max_tokens=options.max_tokens,
        split_documents=options.split_documents,
        val_fraction=options.val_fraction,
        source=describe_sources(options.inputs),
        counts={split: _counts(outcome, split) for split in SPLITS},
        shards=outcome.shards,
        fingerprint=fingerprint,
    )


def _counts(outcome: _Outcome, split: Split) -> SplitCounts:
    shards = [shard for shard in outcome.shards if shard.split == split]
    return SplitCounts(
        documents=sum(shard.documents for shard in shards),
        conversations=sum(shard.conversations for shard in shards),
        interactions=sum(shard.interactions for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        truncated=outcome.truncated[split],
        split=outcome.pieces[split],
    )


def default_workers() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
