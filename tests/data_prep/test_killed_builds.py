"""A killed build goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prep_corpus import write_jsonl

from data_prep import shard
from data_prep.shard import ShardOptions, build_dataset
from data_prep.work import WorkFolder
from rxt_dist.data.manifest import load_manifest
from rxt_dist.errors import DataError

REPOSITORY = Path(__file__).parents[2]


def stories(count: int) -> list[dict[str, Any]]:
    return [
        {"text": f"Story {i}: " + "the fox and the hen went to town. " * (i % 7 + 1)} for i in range(count)
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", stories(400))


def options(source: Path, tokenizer: Path, output: Path, **changes: Any) -> ShardOptions:
    values: dict[str, Any] = {
        "kind": "text", "inputs": [source], "tokenizer": tokenizer, "output": output, "val_fraction": 0.2,
        "shard_bytes": 20_480, "block_documents": 4, "part_bytes": 8000,
    }  # fmt: skip
    return ShardOptions(**{**values, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_kill_at_every_step_costs_nothing_finished(tokenizer_folder: Path, tmp_path: Path) -> None:
    records = stories(90)
    source = write_jsonl(tmp_path / "a.jsonl", records + records[:20])
    folder = tmp_path / "builds"
    folder.mkdir()
    program = Path(__file__).parent / "kill_driver.py"
    done = subprocess.run(
        [sys.executable, program, source, tokenizer_folder, folder],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 40
    assert {kill["step"] for kill in kills} == set(range(1, len(kills) // 2 + 1))
    assert all(kill["same"] for kill in kills), [kill for kill in kills if not kill["same"]]
    assert not any(kill["redone"] or kill["leftover"] for kill in kills)
    assert [kill["kept"] for kill in kills] == sorted(kill["kept"] for kill in kills)
    assert kills[-1]["published"]  # killed after the dataset got its name, before the work folder went
    assert kills[-1]["wrote"] == 0


PROGRAM = """
import sys
from pathlib import Path
from data_prep.shard import ShardOptions, build_dataset
if __name__ == "__main__":
    source, tokenizer, output, part_bytes = sys.argv[1:]
    build_dataset(ShardOptions(kind="text", inputs=[source], tokenizer=Path(tokenizer), output=Path(output),
        val_fraction=0.2, shard_bytes=20_480, block_documents=4, part_bytes=int(part_bytes), workers=2))
"""


@contextmanager
def building(source: Path, tokenizer: Path, output: Path, part_bytes: int) -> Iterator[subprocess.Popen[str]]:
    program = output.parent / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, program, source, tokenizer, output, str(part_bytes)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children_of(process: subprocess.Popen[str]) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_builds_of_several_processes_go_on(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", stories(12_000))
    part_bytes = 30_000
    parts = tmp_path / ".d.work" / "parts"

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}

    before: dict[str, int] = {}
    for wanted in (1, 8, 20):  # kill the same build three times
        with building(source, tokenizer_folder, tmp_path / "d", part_bytes) as process:
            wait_for(lambda wanted=wanted: len(finished()) >= wanted)
            children = children_of(process)
            process.kill()
            process.wait()
        assert len(children) >= 2
        wait_for(lambda children=children: not any(Path(f"/proc/{child}").exists() for child in children))
        now = finished()
        assert before.items() <= now.items()  # nothing was written again
        before = now
        assert not (tmp_path / "d").exists()
    build_dataset(options(source, tokenizer_folder, tmp_path / "d", part_bytes=part_bytes, workers=2))
    build_dataset(options(source, tokenizer_folder, tmp_path / "e"))
    assert contents(tmp_path / "d") == contents(tmp_path / "e")
    assert not (tmp_path / ".d.work").exists()


@pytest.mark.slow
def test_a_killed_worker_stops_the_build_but_keeps_its_work(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", stories(12_000))
    with building(source, tokenizer_folder, tmp_path / "d", 30_000) as process:
        wait_for(lambda: len(list(tmp_path.glob(".d.work/parts/*.npz"))) >= 4)
        for child in children_of(process):
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(int(child), signal.SIGKILL)
                break
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1  # the program above has no handler for errors
    assert "a worker process ended unexpectedly" in error
    assert len(list(tmp_path.glob(".d.work/parts/*.npz"))) >= 4
    build_dataset(options(source, tokenizer_folder, tmp_path / "d", part_bytes=30_000))
    build_dataset(options(source, tokenizer_folder, tmp_path / "e"))
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


class Stop(BaseException):
    """What an interruption from outside looks like to the code."""


def interrupted(build: ShardOptions, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build that stops before its shards are written; returns its work folder."""

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(shard, "make_plan", stop)
        with pytest.raises(Stop):
            build_dataset(build)
    return build.output.with_name(f".{build.output.name}.work")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 0.1}, r"belongs to a build with --val-fraction 0\.2, not 0\.1; finish it with"),
        ({"max_tokens": 64}, "belongs to a build with --max-tokens None, not 64"),
        ({"dedup": True}, "belongs to a build with --dedup False, not True"),
        ({"block_documents": 8}, "belongs to a build with --block-documents 4, not 8"),
        ({"inputs": ["other"]}, "belongs to a build of other inputs"),
    ],
)
def test_a_build_with_other_options_leaves_the_work_alone(
    source: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    work = interrupted(options(source, tokenizer_folder, tmp_path / "d"), monkeypatch)
    before = contents(work)
    if "inputs" in change:
        change = {"inputs": [source, write_jsonl(tmp_path / "b.jsonl", stories(3))]}
    with pytest.raises(DataError, match=message):
        build_dataset(options(source, tokenizer_folder, tmp_path / "d", **change))
    assert contents(work) == before
    build_dataset(options(source, tokenizer_folder, tmp_path / "d", workers=2))
    assert not work.exists()


def test_another_tokenizer_is_another_build(
    source: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(options(source, tokenizer_folder, tmp_path / "d"), monkeypatch)
    other = tmp_path / "tokenizer"
    other.mkdir()
    text = (tokenizer_folder / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(DataError, match="belongs to a build with --tokenizer"):
        build_dataset(options(source, other, tmp_path / "d"))


def test_an_edited_input_is_read_again_with_all_after_it(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad record in the last of three files: the parts of the files before it survive its correction."""
    names = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for number, path in enumerate(names):
        write_jsonl(path, stories(300 + number))
    good = names[2].read_text()
    names[2].write_text(good + "{broken\n")
    build = options(names[0], tokenizer_folder, tmp_path / "d", inputs=names)
    with pytest.raises(DataError, match=r"c\.jsonl: line 303: not JSON"):
        build_dataset(build)
    parts = tmp_path / ".d.work" / "parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert len(before) > 10
    names[2].write_text(good)
    work = interrupted(build, monkeypatch)
    after = {path.name: path.stat().st_mtime_ns for path in (work / "parts").glob("*.npz")}
    kept = [name for name, time_ns in before.items() if after[name] == time_ns]
    assert len(before) * 0.5 < len(kept) < len(before)  # two of three files, less the part that spans two
    build_dataset(build)
    build_dataset(options(names[0], tokenizer_folder, tmp_path / "e", inputs=names))
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_an_input_that_changes_size_only_by_time_is_read_again(
    source: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = options(source, tokenizer_folder, tmp_path / "d")
    interrupted(build, monkeypatch)
    text = source.read_text()
    source.write_text(text.replace("Story 7:", "Glory 7:"))
    os.utime(source, ns=(1, 1))
    build_dataset(build)
    build_dataset(options(source, tokenizer_folder, tmp_path / "e"))
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_one_process_at_a_time(source: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    build = options(source, tokenizer_folder, tmp_path / "d")
    with (
        WorkFolder(build.output, build.identity(), []),
        pytest.raises(DataError, match="is in use: another process builds"),
    ):
        build_dataset(build)
    build_dataset(build)


def test_rests_of_a_start_that_failed_are_no_obstacle(
    source: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Killed before the description of the build was written, or while parts were."""
    work = tmp_path / ".d.work"
    (work / "parts").mkdir(parents=True)
    (work / "build.json").write_text("")
    (work / "parts" / "part-000000.npz.77.tmp").write_text("half")
    (tmp_path / "d").mkdir()  # an empty output folder is fine
    build_dataset(options(source, tokenizer_folder, tmp_path / "d"))
    assert not work.exists()
    assert len(load_manifest(tmp_path / "d").shards) > 3


def test_parts_that_finished_out_of_order_are_kept(
    source: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = options(source, tokenizer_folder, tmp_path / "d")
    work = interrupted(build, monkeypatch)
    (work / "parts.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("parts/*.npz")}
    assert len(before) > 4
    for missing in (1, 3):
        (work / "parts" / f"part-{missing:06d}.npz").unlink()
    interrupted(build, monkeypatch)
    after = {path.name: path.stat().st_mtime_ns for path in work.glob("parts/*.npz")}
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != before[name]} == {"part-000001.npz", "part-000003.npz"}
    build_dataset(build)
    build_dataset(options(source, tokenizer_folder, tmp_path / "e"))
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


@pytest.mark.parametrize("described", [True, False])
def test_a_build_killed_while_it_tidied_up_is_finished(
    source: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: bool
) -> None:
    """The dataset has its name; some or all of the work folder is left."""
    build = options(source, tokenizer_folder, tmp_path / "d")
    work = interrupted(build, monkeypatch)
    build_dataset(options(source, tokenizer_folder, tmp_path / "e"))
    (tmp_path / "e").rename(tmp_path / "d")
    (work / "parts" / "part-000000.npz").unlink()
    other = options(source, tokenizer_folder, tmp_path / "d", val_fraction=0.1)
    with pytest.raises(DataError, match="exists and is not empty"):
        build_dataset(other)
    if described:
        assert build_dataset(build) == load_manifest(tmp_path / "d")
    else:
        (work / "build.json").unlink()
        with pytest.raises(DataError, match="exists and is not empty"):
            build_dataset(build)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "d"]


def test_a_start_without_anything_finished_is_no_obstacle_for_other_options(
    source: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(options(source, tokenizer_folder, tmp_path / "d"), monkeypatch)
    for part in work.glob("parts/*.npz"):
        part.unlink()
    build_dataset(options(source, tokenizer_folder, tmp_path / "d", val_fraction=0.1))
    assert load_manifest(tmp_path / "d").val_fraction == 0.1


def test_a_failure_before_anything_is_finished_leaves_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="is empty"):
        build_dataset(options(source, tokenizer_folder, tmp_path / "d"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_finished_dataset_is_not_touched_by_a_second_build(
    source: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    build = options(source, tokenizer_folder, tmp_path / "d")
    build_dataset(build)
    before = contents(tmp_path / "d")
    with pytest.raises(DataError, match="exists and is not empty"):
        build_dataset(build)
    assert contents(tmp_path / "d") == before
    assert not (tmp_path / ".d.work").exists()
