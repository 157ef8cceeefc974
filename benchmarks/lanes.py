"""The lane schedule at scale, and how much of what lanes process is real.

    python -m benchmarks.lanes
    python -m benchmarks.lanes --data datasets/conversations --seq-len 256
    python -m benchmarks.lanes --jsonl chats.jsonl.gz --tokenizer tokenizer

Planning: CPU microseconds a conversation for one epoch of synthetic conversations (log-normal, 1 to 200
interactions, mean 7.4), first permutation included, the slowest single call, and how far memory grows
above the interaction counts.

Utilisation, where conversations are given: one epoch of the real loader, as SMAT reads it. *Processed* are
the rows of its flat tokens: what the decoder answers, and what the encoder reads to write it into the memory
(every interaction but a conversation's last, once), with the single pad row that a lane has where it writes
nothing. *Real* is all of that but the pad rows. Attention kernels that work on a padded view pad more
inside. *Balance* is the mean over ranks of the tokens of a step, divided by the most that a rank has: what
waiting for the slowest rank leaves.

For comparison, full batches of conversations that start together, every interaction padded to --seq-len: cut
to the shortest conversation of the batch, and kept until the longest ends. What does not fill a batch is left
out.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.cli import main as rxt_data
from rxt_dist.data.lane_loader import LaneInteractions, LaneLoader
from rxt_dist.data.lanes import LaneSchedule, LaneState
from rxt_dist.data.order import Int64Array, epoch_permutation
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.errors import ConfigError, exit_with_message

KEY = 1
_MIB = 1 << 20


@dataclass(frozen=True)
class Planning:
    """One epoch of the lane schedule."""

    seconds: float
    slowest_call: float
    """Seconds."""
    memory: int
    """Bytes that the process grew at most, above the interaction counts."""


@dataclass(frozen=True)
class Utilisation:
    """What a way of batching processes in an epoch; shares of 1."""

    busy: float
    """Lanes (rows of a batch) that hold an interaction."""
    real: float
    """Real tokens of the tokens processed."""
    trained: float
    """Interactions that are trained on, of all."""
    balance: dict[int, float]
    """Number of ranks -> mean tokens of a rank over the most of any, step by step."""


def synthetic_counts(conversations: int) -> np.ndarray:
    """Interactions of each conversation: uint32, log-normal with a long tail."""
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(1.6, 0.9, conversations).round(), 1, 200).astype(np.uint32)


def bench_planning(counts: np.ndarray, lanes: int, window: int) -> Planning:
    """Plan one epoch in windows of ``window`` positions."""
    calls: list[float] = []

    def epoch() -> None:
        schedule, state = LaneSchedule(counts, key=KEY, lanes=lanes), LaneState.initial(lanes)
        while state.epoch == 0:
            start = time.process_time()
            _, state = schedule.next_window(state, window)
            if state.epoch == 0:  # the last call also makes the permutation of the next epoch
                calls.append(time.process_time() - start)

    start = time.process_time()
    memory = _growth(epoch)
    return Planning(time.process_time() - start, max(calls[1:], default=0.0), memory)


def _growth(work: Callable[[], object]) -> int:
    """Peak resident bytes during ``work``, above those before it (Linux with glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of freed memory would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def lane_utilisation(source: InteractionPieces, lanes: int, window: int, ranks: Sequence[int]) -> Utilisation:
    """One epoch through the loader; ``ranks`` that divide ``lanes`` are compared."""
    interactions = len(source.lengths)
    steps = -(-interactions // (lanes * window))
    real = busy = 0
    per_lane = []
    with LaneLoader(
        source, key=KEY, lanes=lanes, micro_lanes=lanes, window=window, dp_rank=0, dp_size=1,
        pad_id=0, stm_size=1,
    ) as loader:  # fmt: skip
        for _ in range(steps):
            (batch,) = next(loader).batches
            parts = (*batch.look_backs, *batch.positions)
            per_lane.append(sum(_rows(part) for part in parts))
            real += sum(int(_rows(part)[part.present.numpy()].sum()) for part in parts)
            busy += sum(int(part.present.sum()) for part in batch.positions)
    processed = np.array(per_lane)  # [steps, lanes]
    balance = {}
    for count in ranks:
        if lanes % count == 0:
            of_ranks = processed.reshape(steps, count, -1).sum(axis=2)
            balance[count] = float(of_ranks.mean(axis=1).sum() / of_ranks.max(axis=1).sum())
    cells = steps * lanes * window
    return Utilisation(busy / cells, real / int(processed.sum()), 1.0, balance)


def _rows(part: LaneInteractions) -> Int64Array:
    """Rows of every lane: int64 [lanes]."""
    return np.diff(part.layout.cu_seqlens.numpy()).astype(np.int64)


def batch_utilisation(source: InteractionPieces, rows: int, *, until_longest: bool) -> Utilisation:
    """An epoch of full batches of ``rows`` conversations that start together, padded to the sequence length.

    Interaction t is answered by the decoder, and interaction t - 1 encoded before that.
    """
    counts = source.dataset.interactions.astype(np.int64)
    ends = np.concatenate(([0], np.cumsum(source.lengths, dtype=np.int64)))
    batches = len(counts) // rows
    order = epoch_permutation(KEY, 0, len(counts))[: batches * rows].reshape(batches, rows)
    length = counts[order]
    steps = (length.max(axis=1) if until_longest else length.min(axis=1))[:, None]
    served = np.minimum(length, steps)
    first = source.dataset.interaction_starts[order]
    answered = ends[first + served] - ends[first]
    written = ends[first + served - 1] - ends[first]
    processed = rows * source.seq_len * int((2 * steps - 1).sum())
    return Utilisation(
        busy=float(served.sum() / (rows * steps.sum())),
        real=float((answered + written).sum() / processed),
        trained=float(served.sum() / counts.sum()),
        balance={},
    )


def print_planning(conversations: int, lanes: Sequence[int], windows: Sequence[int]) -> None:
    """Measure and print the table of planning."""
    counts = synthetic_counts(conversations)
    print(
        f"{conversations:,} conversations, {int(counts.sum()):,} interactions, {counts.nbytes / _MIB:.0f} MiB"
    )
    print(
        f"{'lanes':>7}{'window':>8}{'us / conversation':>20}{'epoch, s':>10}"
        f"{'slowest, ms':>13}{'memory, MiB':>13}"
    )
    for count in lanes:
        for window in windows:
            found = bench_planning(counts, count, window)
            print(
                f"{count:>7}{window:>8}{found.seconds / conversations * 1e6:>20.2f}{found.seconds:>10.1f}"
                f"{found.slowest_call * 1e3:>13.1f}{found.memory / _MIB:>13.0f}"
            )


def print_utilisation(
    source: InteractionPieces, lanes: Sequence[int], windows: Sequence[int], ranks: Sequence[int]
) -> None:
    """Measure and print the table of utilisation."""
    counts = source.dataset.interactions
    print(
        f"\n{len(counts):,} conversations of {counts.min()} to {counts.max()} interactions, mean "
        f"{counts.mean():.1f}; these have {source.lengths.min()} to {source.lengths.max()} tokens, mean "
        f"{source.lengths.mean():.0f}; --seq-len {source.seq_len}"
    )
    heads = "".join(f"{f'balance, {count}':>12}" for count in ranks)
    print(f"{'batching':22}{'lanes':>7}{'window':>8}{'busy':>9}{'real tokens':>13}{'trained':>9}{heads}")

    def row(name: str, count: int, window: object, found: Utilisation) -> None:
        shares = "".join(
            f"{found.balance[number]:>12.1%}" if number in found.balance else f"{'-':>12}" for number in ranks
        )
        print(
            f"{name:22}{count:>7}{window!s:>8}{found.busy:>9.1%}{found.real:>13.1%}{found.trained:>9.1%}{shares}"
        )

    for count in lanes:
        if count <= len(counts):
            row("cut to the shortest", count, "-", batch_utilisation(source, count, until_longest=False))
            row("until the longest", count, "-", batch_utilisation(source, count, until_longest=True))
        for window in windows:
            row("lanes", count, window, lane_utilisation(source, count, window, ranks))


def open_source(arguments: argparse.Namespace, folder: Path) -> InteractionPieces | None:
    """The conversations to measure, tokenised into ``folder`` where they are given as text."""
    if arguments.jsonl is None:
        return None if arguments.data is None else _pieces(arguments.data, arguments.seq_len)
    if arguments.tokenizer is None:
        raise ConfigError("--jsonl needs --tokenizer, a folder with tokenizer.json")
    options = ["--input", arguments.jsonl, "--tokenizer", arguments.tokenizer, "--output", folder / "data"]
    code = rxt_data(["shard", "conversations", *map(str, options), "--workers", "1"])
    if code:
        raise ConfigError(f"--jsonl: {arguments.jsonl} could not be tokenised")
    return _pieces(folder / "data", arguments.seq_len)


def _pieces(folder: Path, seq_len: int) -> InteractionPieces:
    return InteractionPieces(Dataset(folder, "train"), seq_len)


def main() -> int:
    """Measure what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=10_000_000, help="of the planning benchmark")
    parser.add_argument("--lanes", type=int, nargs="+", default=[64, 256, 1024, 8192])
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="whose balance is shown")
    parser.add_argument("--data", type=Path, help="folder of a conversation dataset")
    parser.add_argument("--jsonl", type=Path, help="conversations as text, instead of --data")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer for --jsonl")
    parser.add_argument("--seq-len", type=int, default=256, help="longest interaction in tokens")
    arguments = parser.parse_args()
    print(f"python {platform.python_version()}, numpy {np.__version__}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(arguments, Path(folder))
        print_planning(arguments.conversations, arguments.lanes, arguments.windows)
        if source is not None:
            print_utilisation(source, arguments.lanes, arguments.windows, arguments.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(exit_with_message(main))
