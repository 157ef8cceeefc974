"""Random documents and conversations as real datasets, for benchmarks of training."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from benchmarks.data import write_dataset
from rxt_dist.config import STAGE_DATA, DataConfig, RunConfig, load_config, resolve_dataset
from rxt_dist.data.format import ConversationTokens
from rxt_dist.data.tokens import ANSWER, BOS, EOS, QUERY, SPECIAL_TOKENS
from rxt_dist.errors import ConfigError
from rxt_dist.parallel.bootstrap import World

IDS = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
SMALLEST_VOCABULARY = 512
SHORTEST = 8

Lengths = npt.NDArray[np.int64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is trained on."""
    parser.add_argument(
        "--lengths",
        nargs="+",
        metavar="N",
        help="tokens of a document and of an interaction: the least and the most of them, or a text file "
        "with one length a line, from which they are drawn (default: seq_len / 4 to seq_len)",
    )
    parser.add_argument("--interactions", type=int, default=6, help="of a conversation (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the temporary datasets are written")


def possible_lengths(arguments: argparse.Namespace, seq_len: int) -> Lengths:
    """The lengths that documents and interactions are drawn from, each as probable as the others.

    Raises:
        ConfigError: the option or a line of its file is wrong.
    """
    given = arguments.lengths
    if given is None:
        return np.arange(max(SHORTEST, seq_len // 4), seq_len + 1)
    where, texts = "--lengths", given
    if len(given) == 1:
        where = f"--lengths {given[0]}"
        try:
            texts = Path(given[0]).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read ({error}); valid: two numbers, or a file") from None
    elif len(given) > 2:
        raise ConfigError(f"--lengths: found {len(given)} values; valid: two numbers, or a file")
    wrong = [text for text in texts if not text.isdecimal() or int(text) < SHORTEST]
    if wrong or not texts:
        found = repr(wrong[0]) if wrong else "nothing"
        raise ConfigError(f"{where}: found {found}; valid: whole numbers of {SHORTEST} or more")
    lengths = np.array([int(text) for text in texts], dtype=np.int64)
    if len(given) == 1:
        return lengths
    if lengths[0] > lengths[1]:
        raise ConfigError(f"--lengths: found {lengths[0]} {lengths[1]}; valid: the least, then the most")
    return np.arange(lengths[0], lengths[1] + 1)


def read_config(config: str, overrides: Sequence[str], stage: int | None) -> tuple[RunConfig, list[int]]:
    """The run with its vocabulary filled in, and the numbers of the stages to measure."""
    run = load_config(config, overrides, require_data=False)
    vocab_size = run.model.vocab_size
    if vocab_size == "auto":
        vocab_size = run.model.card_vocab_size or SMALLEST_VOCABULARY
    if vocab_size <= len(IDS):
        raise ConfigError(f"model.vocab_size: found {vocab_size}; valid here: {len(IDS) + 1} or more")
    stages = list(range(len(run.stages))) if stage is None else [stage]
    if not 0 <= stages[0] < len(run.stages):
        raise ConfigError(f"--stage: found {stages[0]}; valid: 0 to {len(run.stages) - 1}")
    return resolve_dataset(run, vocab_size=vocab_size, special_ids=IDS, tokenizer_sha256={}), stages


def documents(count: int, lengths: Lengths, vocab_size: int) -> list[np.ndarray]:
    """``count`` documents of random tokens."""
    rng = np.random.default_rng(0)
    words = (rng.integers(len(IDS), vocab_size, size - 2) for size in rng.choice(lengths, count))
    return [np.concatenate(([IDS[BOS]], tokens, [IDS[EOS]])) for tokens in words]


def conversations(
    count: int, interactions: int, lengths: Lengths, vocab_size: int
) -> list[ConversationTokens]:
    """``count`` conversations of random tokens; half of the tokens of an interaction are its answer."""
    rng = np.random.default_rng(0)
    made = []
    for sizes in rng.choice(lengths, (count, interactions)):
        segments = []
        for size in sizes:
            words = rng.integers(len(IDS), vocab_size, size - 4)
            middle = len(words) // 2
            segments.append(np.concatenate(([IDS[BOS], IDS[QUERY]], words[:middle])))
            segments.append(np.concatenate(([IDS[ANSWER]], words[middle:], [IDS[EOS]])))
        made.append(ConversationTokens(segments, [1, 2] * interactions))
    return made


def write_datasets(
    folder: Path, config: RunConfig, stages: Sequence[int], steps: int, arguments: argparse.Namespace
) -> None:
    """Datasets of the ``stages`` as ``folder/text`` and ``folder/conversations``, about as large as
    ``steps`` steps need."""
    vocab_size = config.model.vocab_size
    assert isinstance(vocab_size, int)
    lengths = possible_lengths(arguments, config.model.seq_len)
    batch, lanes = config.batch, config.batch.lanes or 0
    pieces = int(steps * batch.packs * batch.pack_tokens / lengths.mean()) + 1
    kinds = {STAGE_DATA[config.stages[index].name] for index in stages}
    if "text" in kinds:
        items = documents(pieces, lengths, vocab_size)
        write_dataset(folder / "text", "text", items, vocab_size=vocab_size, special_tokens=IDS)
    if "conversations" in kinds:
        of_text = any(not config.stages[index].uses_lanes for index in stages)
        needed = max(pieces if of_text else 0, steps * lanes * batch.window)
        talks = conversations(
            lanes + needed // arguments.interactions + 1, arguments.interactions, lengths, vocab_size
        )
        target = folder / "conversations"
        write_dataset(target, "conversations", talks, vocab_size=vocab_size, special_tokens=IDS)


@contextmanager
def datasets(
    config: RunConfig, stages: Sequence[int], world: World, steps: int, arguments: argparse.Namespace
) -> Iterator[RunConfig]:
    """``config`` with datasets that rank 0 makes, and removes at the end."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) if world.is_main else nullcontext("") as temporary:
        if world.is_main:
            write_datasets(Path(temporary), config, stages, steps, arguments)
        shared = [temporary]
        dist.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
        data = DataConfig(text=folder / "text", conversations=folder / "conversations")
        yield config.model_copy(update={"data": data})
        dist.barrier()
