"""Training of a byte-level BPE tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.inputs import check_inputs, read_chunks
from data_prep.progress import progress_bar
from data_prep.records import parse_chunk
from rxt_dist.data.tokens import SPECIAL_TOKENS, TOKENIZER_FILE, UNK
from rxt_dist.errors import DataError
from rxt_dist.files import fsync_folder

logger = logging.getLogger(__name__)

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(inputs: Sequence[Path], vocab_size: int, output: Path) -> int:
    """Train on texts and conversations (mixed) and write ``output/tokenizer.json`` atomically.

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
    check_inputs(inputs)
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(inputs), trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        logger.warning("the corpus fills only %d of %d vocabulary entries", size, vocab_size)
    _write(tokenizer, output)
    return size


def _texts(inputs: Sequence[Path]) -> Iterator[list[str]]:
    empty = True
    with progress_bar("reading", "record") as bar:
        for chunk in read_chunks(inputs):
            records = parse_chunk(chunk, kind=None)
            bar.update(len(records))
            empty = False
            yield [text for record in records for text in record.texts()]
    if empty:
        raise DataError(f"the corpus is empty: no record in {', '.join(str(path) for path in inputs)}")


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
