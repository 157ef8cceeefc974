"""Training of a byte-level BPE tokenizer."""

from __future__ import annotations

import heapq
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.inputs import InputReader
from data_prep.progress import progress_bar
from data_prep.records import Record, parse_chunk, sample_key
from data_prep.sources import Source, resolve_inputs
from rxt_dist.data.tokens import SPECIAL_TOKENS, TOKENIZER_FILE, UNK
from rxt_dist.errors import DataError
from rxt_dist.files import fsync_folder

logger = logging.getLogger(__name__)

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    inputs: Sequence[str | Path], vocab_size: int, output: Path, sample_documents: int | None = None
) -> int:
    """Train on texts and conversations (mixed) and write ``output/tokenizer.json`` atomically.

    ``sample_documents``: train on so many of them, drawn by hash, so that the sample is the same for every
    order of the inputs; they are held in memory. None: on all.

    Every byte has a token, so no text becomes [UNK] and ``decode(encode(text)) == text``. Returns the size
    of the vocabulary, which is smaller than ``vocab_size`` when the corpus has too few pairs to merge.

    Raises:
        DataError: the vocabulary is too small, or an input is missing, damaged or empty.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: at least {MIN_VOCAB_SIZE} are needed "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    if sample_documents is not None and sample_documents < 1:
        raise DataError(f"--sample-documents is {sample_documents}; it must be at least 1")
    sources = resolve_inputs(inputs)
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with tempfile.TemporaryDirectory(prefix="rxt-data-") as downloads:
        records = _records(sources, Path(downloads))
        if sample_documents is not None:
            records = _sample(records, sample_documents)
        tokenizer.train_from_iterator((record.texts() for record in records), trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        logger.warning("the corpus fills only %d of %d vocabulary entries", size, vocab_size)
    _write(tokenizer, output)
    return size


def _records(sources: Sequence[Source], downloads: Path) -> Iterator[Record]:
    empty = True
    with progress_bar("reading", "record") as bar:
        for chunk, _ in InputReader(sources, downloads).chunks():
            records = parse_chunk(chunk, kind=None)
            bar.update(len(records))
            empty = False
            yield from records
    if empty:
        names = ", ".join(source.shown for source in sources)
        raise DataError(f"the corpus is empty: no record in {names}")


def _sample(records: Iterator[Record], count: int) -> Iterator[Record]:
    """The ``count`` records with the smallest keys, in the order of the input."""
    heap: list[tuple[int, int, Record]] = []  # the largest key on top
    for place, record in enumerate(records):
        entry = (-sample_key(record), -place, record)
        if len(heap) < count:
            heapq.heappush(heap, entry)
        elif entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, entry)
    yield from (record for _, _, record in sorted(heap, key=lambda entry: -entry[1]))


def _write(tokenizer: Tokenizer, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / TOKENIZER_FILE
    temporary = output / f".{TOKENIZER_FILE}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(tokenizer.to_str(pretty=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(output)
