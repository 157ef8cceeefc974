"""What a person sees of a long build: rate and remaining time, in a terminal and in a log."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prep_corpus import write_jsonl

from data_prep import progress

REPOSITORY = Path(__file__).parents[2]
SIZE = r"\d+(\.\d+)?[kM]?"
BAR = rf"tokenising: +\d+%[^\r]*{SIZE}/{SIZE} \[\d+:\d\d<\d+:\d\d, +{SIZE}B/s, \d+\.\d M tokens\]"
PROGRAM = """
import sys
from pathlib import Path
from data_prep.shard import ShardOptions, build_dataset
source, tokenizer, output = map(Path, sys.argv[1:])
options = ShardOptions(kind="text", inputs=[source], tokenizer=tokenizer, output=output, part_bytes=20_000)
build_dataset(options)
"""


def test_a_terminal_shows_rate_and_remaining_time(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"Story {i} " * 20} for i in range(6000)])
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))  # rows, columns
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, source, tokenizer_folder, tmp_path / "d"],
        stderr=theirs, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    bars = [match.group() for match in re.finditer(BAR, text)]
    assert bars, text
    assert any("0.0 M tokens" not in bar for bar in bars)
    assert re.search(r"writing: .*\d+/\d+ \[.* documents/s\]", text)


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.1)
    start = time.monotonic()
    with progress.progress_bar("tokenising", "B", total=4_000_000) as bar:
        for _ in range(20):
            time.sleep(0.02)
            bar.update(200_000)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= (time.monotonic() - start) / 0.1 + 1
    pattern = rf"tokenising: +\d+%\|.*\| {SIZE}/4\.00M \[\d\d:\d\d<\d\d:\d\d, {SIZE}B/s\]"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert "100%" in lines[-1]


def test_short_commands_leave_logs_alone(
    run: Callable[..., tuple[int, str, str]], corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    options = ("--tokenizer", tokenizer_folder, "--output", tmp_path / "d", "--workers", 1)
    code, _, error = run("shard", "text", "--input", corpus / "stories.jsonl", *options)
    assert (code, "tokenising" in error, "B/s" in error) == (0, False, False)
