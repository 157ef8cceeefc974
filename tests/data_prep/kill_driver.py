"""A program that builds a dataset over and over in child processes that kill themselves (SIGKILL) at every
step that makes something permanent, and compares the outcome of going on with that of a quiet build.

    python kill_driver.py INPUT TOKENIZER FOLDER

A step is a rename: everything that counts as finished got its name that way. The children die just before or
just after the k-th one, for every k. Prints one JSON line a kill.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset  # noqa: F401  # imported once here instead of in every child

from data_prep.shard import ShardOptions, build_dataset

rename = Path.replace


def options(source: Path, tokenizer: Path, output: Path) -> ShardOptions:
    return ShardOptions(
        kind="text", inputs=[source], tokenizer=tokenizer, output=output, val_fraction=0.2, dedup=True,
        shard_bytes=10_240, block_documents=4, part_bytes=1500,
    )  # fmt: skip


def in_child(work: Callable[[], None]) -> int:
    """Exit status of ``work`` in a child process: 0, or minus the signal."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, before: bool, todo: ShardOptions) -> Callable[[], None]:
    seen = 0

    def counting(path: Path, target: Any) -> Path:
        nonlocal seen
        seen += 1
        if seen == step and before:
            os.kill(os.getpid(), signal.SIGKILL)
        done = rename(path, target)
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def work() -> None:
        Path.replace = counting  # type: ignore[method-assign]
        build_dataset(todo)

    return work


def going_on(todo: ShardOptions, report: Path) -> Callable[[], None]:
    """A build that notes which parts and shards it wrote itself."""
    wrote: list[str] = []

    def counting(path: Path, target: Any) -> Path:
        wrote.append(Path(target).name)
        return rename(path, target)

    def work() -> None:
        Path.replace = counting  # type: ignore[method-assign]
        build_dataset(todo)
        report.write_text(json.dumps(wrote))

    return work


def finished(work: Path) -> list[str]:
    """Names of the parts and shards that the work folder counts as finished."""
    markers = [f"{path.stem}.tar" for path in work.glob("shards/*.json")]
    return sorted([path.name for path in work.glob("parts/*.npz")] + markers)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> None:
    source, tokenizer, folder = (Path(argument) for argument in sys.argv[1:])
    quiet = folder / "quiet"
    assert in_child(lambda: build_dataset(options(source, tokenizer, quiet)) and None) == 0
    expected = contents(quiet)
    step = 0
    while True:
        step += 1
        for before in (True, False):
            target, work, report = folder / "out", folder / ".out.work", folder / "report.json"
            todo = options(source, tokenizer, target)
            status = in_child(killed_at(step, before, todo))
            if status == 0:  # there is no such step: the build is complete
                return
            assert status == -signal.SIGKILL, status
            kept = finished(work)
            published = target.exists()
            status = in_child(going_on(todo, report))
            wrote = json.loads(report.read_text()) if status == 0 else []
            result = {
                "step": step,
                "before": before,
                "kept": len(kept),
                "published": published,
                "redone": sorted(set(kept) & set(wrote)),
                "wrote": len(wrote),
                "same": status == 0 and contents(target) == expected,
                "leftover": work.exists(),
            }
            print(json.dumps(result), flush=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
