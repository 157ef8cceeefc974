from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.launch import python

from benchmarks.data import write_dataset
from benchmarks.lanes import KEY, batch_utilisation, bench_planning, lane_utilisation, synthetic_counts
from data_prep.cli import main as rxt_data
from rxt_dist.data.format import ConversationTokens
from rxt_dist.data.lanes import LaneSchedule, LaneState
from rxt_dist.data.order import epoch_permutation
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.data.reader import Dataset

SEQ_LEN = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    items = []
    for count in rng.integers(1, 9, 50):
        lengths = rng.integers(3, 11, 2 * count)
        items.append(ConversationTokens([np.arange(7, 7 + n) for n in lengths], [1, 2] * int(count)))
    return write_dataset(tmp_path_factory.mktemp("talk") / "data", "conversations", items)


@pytest.fixture(scope="module")
def talk(folder: Path) -> list[list[int]]:
    """Tokens of every interaction of every conversation, none longer than the sequence length."""
    dataset = Dataset(folder, "train")
    lengths = np.minimum(dataset.query_tokens + dataset.answer_tokens, SEQ_LEN)
    return [part.tolist() for part in np.split(lengths, dataset.interaction_starts[1:-1])]


@pytest.mark.parametrize("until_longest", [False, True])
def test_padded_batches_against_a_loop(folder: Path, talk: list[list[int]], until_longest: bool) -> None:
    rows = 6
    order = epoch_permutation(KEY, 0, len(talk)).tolist()
    processed = real = held = places = 0
    for start in range(0, len(talk) // rows * rows, rows):
        batch = [talk[number] for number in order[start : start + rows]]
        steps = (max if until_longest else min)(len(conversation) for conversation in batch)
        for step in range(steps):
            for conversation in batch:
                places += 1
                processed += SEQ_LEN * (2 if step else 1)
                if step < len(conversation):
                    held += 1
                    real += conversation[step] + (conversation[step - 1] if step else 0)
    source = InteractionPieces(Dataset(folder, "train"), SEQ_LEN)
    found = batch_utilisation(source, rows, until_longest=until_longest)
    assert found.busy == held / places
    assert found.real == real / processed
    assert found.trained == held / sum(len(conversation) for conversation in talk)


def test_lanes_against_the_schedule(folder: Path, talk: list[list[int]]) -> None:
    lanes, window, ranks = 8, 3, 4
    steps = -(-sum(len(conversation) for conversation in talk) // (lanes * window))
    schedule = LaneSchedule([len(conversation) for conversation in talk], key=KEY, lanes=lanes)
    state, real, pads, means, most = LaneState.initial(lanes), 0, 0, 0.0, 0
    for _ in range(steps):
        cells, state = schedule.next_window(state, window)
        of_ranks = [0] * ranks
        for lane in range(lanes):
            for place in range(window):
                conversation = talk[cells.conversations[lane, place]]
                number = int(cells.interactions[lane, place])
                tokens = conversation[number] + (conversation[number - 1] if number else 0)
                pads += number == 0
                real += tokens
                of_ranks[lane // (lanes // ranks)] += tokens + (number == 0)
        means += sum(of_ranks) / ranks
        most += max(of_ranks)
    source = InteractionPieces(Dataset(folder, "train"), SEQ_LEN)
    found = lane_utilisation(source, lanes, window, [ranks, 3])
    assert (found.busy, found.trained) == (1.0, 1.0)
    assert found.real == real / (real + pads)
    assert found.balance == {ranks: pytest.approx(means / most)}


def test_planning_is_measured() -> None:
    np.ones(1 << 21)  # glibc keeps up to twice as much from here on when it is freed
    counts = synthetic_counts(20_000)
    assert counts.min() == 1
    assert counts.max() > 50
    for _ in range(2):
        found = bench_planning(counts, lanes=64, window=4)
        assert 0 < found.slowest_call < found.seconds
        assert found.memory > 8 * len(counts)  # at least the permutation


def lanes_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "benchmarks.lanes", "--conversations", "5000", *map(str, arguments))


def test_tables_of_a_dataset(folder: Path) -> None:
    small = ("--lanes", 8, 64, "--windows", 1, 2, "--ranks", 2, "--seq-len", SEQ_LEN)
    result = lanes_benchmark("--data", folder, *small)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert len([row for row in rows if row[:1] in (["8"], ["64"])]) == 4
    shares = [row[-4:] for row in rows if row[:1] == ["lanes"] and "%" in row[-1]]
    assert len(shares) == 4
    assert all((busy, trained) == ("100.0%", "100.0%") for busy, _, trained, _ in shares)
    assert len([row for row in rows if row[:1] in (["cut"], ["until"])]) == 2  # 50 do not fill 64 rows


def test_text_is_tokenised_first(tmp_path: Path) -> None:
    talk = [{"query": f"how is day {n} ?", "answer": "fine , and yours ?"} for n in range(4)]
    text = tmp_path / "talk.jsonl"
    records = [{"id": str(number), "interactions": talk[: 2 + number % 3]} for number in range(40)]
    text.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = ["tokenizer", "--input", str(text), "--vocab-size", "300", "--output", str(tmp_path / "tok")]
    assert rxt_data(tokenizer) == 0
    result = lanes_benchmark("--jsonl", text, "--tokenizer", tmp_path / "tok", "--lanes", 8, "--windows", 2)
    assert result.returncode == 0, result.stderr
    assert re.search(r"conversations of 2 to 4 interactions", result.stdout)
    assert re.search(r"^lanes +8 +2 +100\.0%", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--jsonl", "talk.jsonl"], "--jsonl needs --tokenizer"), (["--data", "nowhere"], "nowhere")],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    result = lanes_benchmark(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
