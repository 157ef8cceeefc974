"""Bytes that ranks send, counted where process groups are called, against counts by hand."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.launch import run_function

from benchmarks.traffic import Traffic, counted_traffic
from rxt_dist.errors import TrainingError

# bf16 tensors of 24 elements; on four ranks
SIZE, RANKS = 48, 4


def every_operation(pair: dist.ProcessGroup) -> None:
    part, whole = torch.ones(24, dtype=torch.bfloat16), torch.ones(96, dtype=torch.bfloat16)
    dist.all_reduce(part)
    dist.all_reduce_coalesced([part, part])
    dist.reduce(part, 1)
    dist.broadcast(part, 1)
    dist.all_gather([torch.empty_like(part) for _ in range(RANKS)], part)
    dist.all_gather_into_tensor(whole, part)
    dist.reduce_scatter(part, list(whole.chunk(RANKS)))
    dist.reduce_scatter_tensor(part, whole)
    dist.all_to_all_single(torch.empty_like(whole), whole)
    dist.barrier()
    dist.all_reduce(part, group=pair)
    # The first of a pair sends 5 of its 6 rows of 8 bytes, the second 1 of 2.
    splits = [[1, 5], [1, 1]]
    own = pair.rank()
    rows = torch.ones(sum(splits[own]), 4, dtype=torch.bfloat16)
    received = [splits[0][own], splits[1][own]]
    dist.all_to_all_single(torch.empty(sum(received), 4, dtype=rows.dtype), rows, received, splits[own], pair)
    none = torch.empty(0, 4)
    dist.all_to_all_single(torch.empty_like(none), none, [0, 0], [0, 0], pair)


def listed(traffic: Traffic) -> list[tuple[str, str, float, int]]:
    return [(*key, size, traffic.calls[key]) for key, size in traffic.sent.items()]


def count(folder: Path) -> None:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pair = pairs[rank % 2]
    with counted_traffic() as traffic:
        every_operation(pair)
    every_operation(pair)  # as before, and counted no more
    with counted_traffic() as elsewhere:
        thread = threading.Thread(target=dist.all_reduce, args=(torch.ones(2),))
        thread.start()
        thread.join()
    with counted_traffic(), pytest.raises(TrainingError, match=r"ProcessGroup\.gather was called"):
        dist.gather(torch.ones(2), [torch.ones(2)] * RANKS if rank == 0 else None)
    world = dist.group.WORLD
    assert world is not None
    found = {
        "names": {world.group_name: "world", pair.group_name: "pair"},
        "counted": listed(traffic),
        "elsewhere": listed(elsewhere),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_every_operation_sends_what_its_ring_sends(tmp_path: Path) -> None:
    assert run_function(RANKS, count, tmp_path) == [0] * RANKS
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        names = found["names"]
        counted = {(kind, names[group]): (sent, calls) for kind, group, sent, calls in found["counted"]}
        third = SIZE * 3 / 4  # what goes around the ring of all
        assert counted == {
            ("all-reduce", "world"): (2 * third * 3, 2),
            ("reduce", "world"): (third, 1),
            ("broadcast", "world"): (third, 1),
            ("all-gather", "world"): (2 * 3 * SIZE, 2),
            ("reduce-scatter", "world"): (2 * 3 * SIZE, 2),
            ("all-to-all", "world"): (3 * SIZE, 1),
            ("barrier", "world"): (0, 1),
            ("all-reduce", "pair"): (SIZE, 1),
            ("all-to-all", "pair"): (5 * 8 if rank < 2 else 8, 2),
        }
        assert [one[2:] for one in found["elsewhere"]] == [[2 * 8 * 3 / 4, 1]]
