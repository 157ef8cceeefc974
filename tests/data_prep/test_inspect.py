"""Looking at a dataset: `head` and `stats`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prep_corpus import write_jsonl

from data_prep.head import MAX_CHARACTERS
from data_prep.stats import histogram

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dataset(run: Run, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def build(kind: str, records: list[object]) -> Path:
        source = write_jsonl(tmp_path / "a.jsonl", records)
        command = ("--tokenizer", tokenizer_folder, "--val-fraction", 0, "--workers", 1)
        code, _, error = run("shard", kind, "--input", source, *command, "--output", tmp_path / kind)
        assert code == 0, error
        return tmp_path / kind

    return build


def test_head_shows_special_tokens_and_roles(run: Run, dataset: Callable[..., Path]) -> None:
    record = {"system": "Be kind.", "interactions": [{"query": "Who?", "answer": "Me."}]}
    folder = dataset("conversations", [record, *({"query": f"q{i}", "answer": "a"} for i in range(9))])
    code, output, _ = run("head", folder, "-n", 2)
    assert code == 0
    lines = output.splitlines()
    assert lines[0].startswith("train conversation 0: ")
    assert lines[1:4] == ["  system [BOS]Be kind.", "  query  [BOS][Q]Who?", "  answer [A]Me.[EOS]"]
    assert lines[4].startswith("train conversation 1: ")
    assert lines[5:] == ["  query  [BOS][Q]q0", "  answer [A]a[EOS]"]
    assert run("head", folder)[1].count("conversation") == 3
    assert run("head", folder, "-n", 99)[1].count("conversation") == 10


def test_head_cuts_long_texts_and_spells_out_control_characters(
    run: Run, dataset: Callable[..., Path]
) -> None:
    long = "abc " * 1000
    folder = dataset("text", [{"text": "red \x1b[31m alert\nnext é 🦊"}, {"text": long}])
    output = run("head", folder)[1]
    assert "[BOS]red \\x1b[31m alert\n         next é 🦊[EOS]" in output
    shown = len("[BOS]") + len(long) + len("[EOS]")
    assert f" ... ({shown - MAX_CHARACTERS} more characters)" in output
    assert "\x1b" not in output


def test_head_of_nothing(run: Run, dataset: Callable[..., Path]) -> None:
    folder = dataset("text", [{"text": "one"}])
    assert run("head", folder, "--split", "val") == (0, "", "")
    code, _, error = run("head", folder, "-n", 0)
    assert code == 2
    assert "-n is 0; it must be at least 1" in error
    assert run("head", folder / "none")[0] == 2


def test_histograms_count_powers_of_two() -> None:
    values = np.array([3, 3, 4, 7, 8, 100, 2**40], np.int64)
    rows = histogram(values)
    assert rows[0] == [2, 3, 2]
    assert rows[1:3] == [[4, 7, 2], [8, 15, 1]]
    assert rows[-1] == [2**40, 2**41 - 1, 1]
    assert sum(count for _, _, count in rows) == len(values)
    for low, high, count in rows:
        assert count == int(((values >= low) & (values <= high)).sum())
    assert histogram(np.zeros(0, np.int64)) == []


def test_stats_tell_sources_filters_and_lengths(
    run: Run, dataset: Callable[..., Path], tmp_path: Path
) -> None:
    folder = dataset("conversations", [{"query": "q" * n, "answer": "a"} for n in range(1, 40)])
    code, output, _ = run("stats", folder)
    assert code == 0
    assert "filters: none\ndropped: none\nsources:\n" in output
    assert "  a.jsonl: 39 records, 39 documents, " in output
    stats = json.loads(run("stats", folder, "--json")[1])
    train = stats["splits"]["train"]
    assert train["histograms"]["interactions_per_conversation"] == [[1, 1, 39]]
    rows = train["histograms"]["tokens_per_interaction"]
    assert sum(count for _, _, count in rows) == 39
    most = max(count for _, _, count in rows)
    for low, high, count in rows:
        line = next(line for line in output.splitlines() if f" {low:,}-{high:,} " in line)
        assert line.count("#") == -(-40 * count // most)


def test_stats_are_drawn(
    run: Run, dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset("conversations", [{"query": "q" * n, "answer": "a"} for n in range(1, 40)])
    image = tmp_path / "lengths.png"
    assert run("stats", folder, "--png", image)[0] == 0
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, _, error = run("stats", folder, "--png", tmp_path / "none" / "x.png")
    assert code == 2
    assert "x.png: cannot be written: No such file or directory" in error
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, error = run("stats", folder, "--png", image)
    assert code == 2
    assert "drawing needs matplotlib: pip install rxt-dist[monitoring]" in error
