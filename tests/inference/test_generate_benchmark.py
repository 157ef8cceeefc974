"""benchmarks/generate.py measures what it says, at a small size."""

from __future__ import annotations

import subprocess

import pytest
from helpers.launch import python


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("benchmarks/generate.py", "--config", "tiny", "--repeats", "1", *arguments)


def test_both_tables_are_printed() -> None:
    result = benchmark("--prompt", "5", "--tokens", "6", "--batch", "3", "--interactions", "5")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = [[float(cell.replace(",", "")) for cell in line] for line in lines if len(line) in (2, 6)
            and line[0].isdigit()]  # fmt: skip
    assert [row[0] for row in rows] == [1, 3, 1, 2, 4, 5]
    for sequences, cached, cached_ms, uncached, uncached_ms, ratio in rows[:2]:
        assert cached == pytest.approx(sequences * 1e3 / cached_ms, rel=0.02)
        assert uncached == pytest.approx(sequences * 1e3 / uncached_ms, rel=0.02)
        assert ratio == pytest.approx(uncached_ms / cached_ms, abs=0.06)
    assert all(milliseconds > 0 for _, milliseconds in rows[2:])


def test_what_does_not_fit_is_refused() -> None:
    result = benchmark("--prompt", "40", "--tokens", "22")
    assert result.returncode == 2
    assert "found 40 + 22; at most 61 together fit into the seq_len of rxt-tiny" in result.stderr
