"""Agreement of the ranks on what a step leaves out."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.launch import run_function

from rxt_dist.errors import DataError
from rxt_dist.train.corrupt import CorruptBlocks

COUNTS = {"tokens": 1000, "masked": 150, "next": 900}
NOTHING = dict.fromkeys(COUNTS, 0)


def lost(tokens: int) -> dict[str, int]:
    return {"tokens": tokens, "masked": tokens // 10, "next": tokens - 1}


def test_without_the_policy_nothing_changes() -> None:
    corrupt = CorruptBlocks(skip=False, limit=1)
    assert corrupt.agree(COUNTS, NOTHING, {}) == COUNTS
    assert corrupt.blocks == []


def test_one_process_counts_what_it_left_out(caplog: pytest.LogCaptureFixture) -> None:
    corrupt = CorruptBlocks(skip=True, limit=2, known=[("a", 7)])
    with caplog.at_level(logging.WARNING):
        assert corrupt.agree(COUNTS, NOTHING, {("a", 7): "a"}) == COUNTS
        assert corrupt.agree(COUNTS, lost(40), {("a", 7): "a", ("a", 3): "b"}) == {
            "tokens": 960,
            "masked": 146,
            "next": 861,
        }
        corrupt.agree(COUNTS, lost(40), {("a", 7): "a", ("a", 3): "b"})
    assert corrupt.blocks == [("a", 3), ("a", 7)]
    assert [record.message for record in caplog.records] == ["left out: b"]
    with pytest.raises(DataError, match=r"data\.max_corrupt_blocks: 3 blocks .* at most 2; the newest: c;"):
        corrupt.agree(COUNTS, lost(1), {("a", 7): "a", ("a", 3): "b", ("b", 0): "c"})


def agree_on_ranks(folder: str) -> None:
    """What each rank of a group of three sees; its findings go to a file, as assertions would be lost."""
    rank = dist.get_rank()
    corrupt = CorruptBlocks(skip=True, limit=3)
    found = []
    # Step by step what each rank left out, and which blocks it has met by then.
    steps: list[list[tuple[int, list[int]]]] = [
        [(0, []), (0, []), (0, [])],
        [(0, []), (30, [5]), (0, [])],
        [(10, [5]), (0, [5]), (20, [2])],  # rank 0 meets a block that rank 1 has reported
        [(0, [5]), (0, [5]), (0, [2])],
        [(1, [5, 9]), (1, [5, 9]), (1, [2, 9])],  # all at once
    ]
    for step in steps:
        tokens, blocks = step[rank]
        damage = {("a", block): f"block {block} by rank {rank}" for block in blocks}
        counts = corrupt.agree(COUNTS, {"tokens": tokens, "masked": 0, "next": 0}, damage)
        found.append((counts["tokens"], [block for _, block in corrupt.blocks]))
    try:
        corrupt.agree(COUNTS, NOTHING, {("b", 1): "one more"} if rank == 2 else {})
    except DataError as error:
        found.append((0, [len(str(error))]))
    Path(folder, f"{rank}.txt").write_text(repr(found))


def agree_in_pairs(folder: str) -> None:
    """Ranks 0 and 1, and 2 and 3, read the same data; in the last step rank 3 alone meets a block."""
    rank = dist.get_rank()
    corrupt = CorruptBlocks(skip=True, limit=3, copies=2)
    found: list[object] = []
    # Step by step what each pair left out, and which blocks it has met by then.
    steps: list[list[tuple[int, list[int]]]] = [
        [(0, []), (30, [5])],
        [(10, [4]), (0, [5])],
        [(0, [4]), (7 * (rank == 3), [5])],
    ]
    for step in steps:
        tokens, blocks = step[rank // 2]
        lost = {"tokens": tokens, "masked": 0, "next": 0}
        try:
            found.append(corrupt.agree(COUNTS, lost, {(0, b): f"block {b}" for b in blocks})["tokens"])
        except DataError as error:
            found.append(str(error))
    Path(folder, f"{rank}.txt").write_text(repr(found))


def test_ranks_that_read_the_same_data_count_once(tmp_path: Path) -> None:
    assert run_function(4, agree_in_pairs, str(tmp_path)) == [0] * 4
    for rank in range(4):
        first, second, error = ast.literal_eval((tmp_path / f"{rank}.txt").read_text())
        assert (first, second) == (970, 990)
        assert error.startswith("ranks that share tensors found different blocks damaged;")


def test_the_ranks_agree(tmp_path: Path) -> None:
    assert run_function(3, agree_on_ranks, str(tmp_path)) == [0, 0, 0]
    found = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    assert len(set(found)) == 1
    *steps, error = ast.literal_eval(found[0])
    assert steps == [(1000, []), (970, [5]), (970, [2, 5]), (1000, [2, 5]), (997, [2, 5, 9])]
    assert error[1][0] > 0
