from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxt_dist.observe.metrics_file import MetricsFile, read_metrics, truncate_after


def write_steps(path: Path, *steps: int) -> None:
    with MetricsFile(path) as file:
        for step in steps:
            file.write({"step": step, "loss": step / 8})


def test_lines_are_whole_and_visible_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": 1, "stage": "joint_lm", "loss": 2.5})
        assert path.read_bytes() == b'{"step":1,"stage":"joint_lm","loss":2.5}\n'
        file.write({"step": 2, "note": "two\nlines"})
        assert path.read_bytes().count(b"\n") == 2
    assert read_metrics(path)[1]["note"] == "two\nlines"


def test_one_system_call_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real_write = os.write

    def counted(descriptor: int, data: bytes) -> int:
        calls.append(data)
        return real_write(descriptor, data)

    with MetricsFile(tmp_path / "m.jsonl") as file:
        monkeypatch.setattr(os, "write", counted)
        file.write({"step": 1, "values": list(range(10_000))})
    assert len(calls) == 1
    assert calls[0].endswith(b"\n")


def test_non_finite_numbers_are_strings_that_any_json_reader_takes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": 1, "a": float("nan"), "b": [float("inf")], "c": {"d": (float("-inf"), 1.5)}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "a": "nan", "b": ["inf"], "c": {"d": ["-inf", 1.5]}}
    assert float(record["c"]["d"][0]) == float("-inf")


@pytest.mark.parametrize("record", [{}, {"step": None}, {"step": 1.0}, {"step": True}, {"step": "1"}])
def test_a_record_without_integer_step_is_refused(tmp_path: Path, record: dict[str, object]) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file, pytest.raises(ValueError, match="integer 'step'"):
        file.write(record)
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_an_inexpressible_value_writes_nothing(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file, pytest.raises(TypeError):
        file.write({"step": 1, "loss": object()})
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file:
        monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
        with pytest.raises(OSError, match="only written in part"):
            file.write({"step": 1})


def test_reopening_appends(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 2)
    write_steps(path, 3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_reopening_drops_a_torn_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 2)
    os.truncate(path, path.stat().st_size - 4)
    write_steps(path, 2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert "incomplete last line" in caplog.text


def test_two_writers_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    files = [MetricsFile(path), MetricsFile(path)]

    def write_all(file: MetricsFile) -> None:
        for step in range(200):
            file.write({"step": step, "filler": "x" * 500})

    threads = [threading.Thread(target=write_all, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in files:
        file.close()
    assert len(read_metrics(path)) == 400


def test_truncate_keeps_the_step_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 2, 3, 4)
    path.chmod(0o640)
    truncate_after(path, 2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_truncate_drops_torn_and_unreadable_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    # The last line is valid JSON but was never ended: it may be the start of a longer number.
    path.write_bytes(b'{"step":1}\n\x00\x00\n[1]\n{"loss":1}\n{"step":2}\n{"step":3}')
    truncate_after(path, 3)
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'
    assert "4 damaged line(s)" in caplog.text


def test_truncate_of_a_missing_file_does_nothing(tmp_path: Path) -> None:
    truncate_after(tmp_path / "m.jsonl", 5)
    assert list(tmp_path.iterdir()) == []
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_a_failed_replacement_leaves_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 2)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk error"):
        truncate_after(path, 1)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_sound_file_is_read_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, 1)
    with caplog.at_level(logging.WARNING):
        read_metrics(path)
    assert caplog.records == []


@given(
    cut=st.integers(min_value=0, max_value=120), steps=st.lists(st.integers(0, 10), min_size=1, max_size=6)
)
def test_a_crash_at_any_byte_loses_at_most_the_torn_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, steps: list[int]
) -> None:
    path = tmp_path_factory.mktemp("crash") / "m.jsonl"
    write_steps(path, *steps)
    whole = path.read_bytes()[:cut]
    path.write_bytes(whole)
    survivors = whole.count(b"\n")
    write_steps(path, 99)
    assert [record["step"] for record in read_metrics(path)] == [*steps[:survivors], 99]
