"""Which ranks write into each other's memory, and what happens where they cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from helpers.launch import run_function

from rxt_dist.parallel import expert_messages, peers
from rxt_dist.parallel.expert_messages import PassSizes, Traffic
from rxt_dist.parallel.peers import can_write, set_peer_copies

CPU = torch.device("cpu")


def noted(patch: pytest.MonkeyPatch, action: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``action`` gives and what it logs."""
    lines: list[str] = []

    def warning(text: str, *values: object) -> None:
        lines.append(text % values)

    for module in (peers, expert_messages):
        patch.setattr(logging.getLogger(module.__name__), "warning", warning)
    return action(), lines


def ask(folder: Path) -> None:
    hosts = dist.group.WORLD
    assert hosts is not None
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for enabled in (False, True):
            set_peer_copies(enabled)
            found.append(noted(patch, lambda: can_write(CPU, hosts)))
        on_gpu = type("Device", (), {"type": "cuda"})()
        found.append(noted(patch, lambda: can_write(on_gpu, hosts)))
        patch.setattr(peers.socket, "gethostname", lambda: f"node{dist.get_rank()}")
        found.append(noted(patch, lambda: can_write(on_gpu, hosts)))
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_gpus_of_one_host_can_if_they_may(tmp_path: Path) -> None:
    assert run_function(2, ask, tmp_path) == [0, 0]
    for rank in range(2):
        off, on_cpu, on_gpu, on_nodes = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert off == (False, [])
        assert on_gpu == (True, [])
        for found, lines in (on_cpu, on_nodes):
            assert not found
            assert len(lines) == 1
            assert lines[0].startswith("runtime.peer_copies: NCCL brings tokens")


def fail_on_one(folder: Path) -> None:
    group = dist.group.WORLD
    assert group is not None

    def rendezvous(memory: torch.Tensor, group: dist.ProcessGroup) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("CUDA driver error: system not yet initialized\nmore")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "empty", lambda size, **options: torch.empty(size, dtype=torch.uint8))
        patch.setattr(symmetric, "rendezvous", rendezvous)
        patch.setattr(expert_messages, "can_write", lambda device, hosts: True)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        sizes = PassSizes(group)

        def open_twice() -> Traffic:
            for _ in range(2):
                sizes.ask(3, active=True)
                sizes.open_peers(group, CPU, 16, 8)
            return sizes.traffic(group)

        traffic, lines = noted(patch, open_twice)
        torch.save((traffic.peers is None, lines), folder / f"{dist.get_rank()}.pt")


def test_if_one_cannot_nobody_does(tmp_path: Path) -> None:
    assert run_function(2, fail_on_one, tmp_path) == [0, 0]
    for rank in range(2):
        unused, lines = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert unused
        assert len(lines) == 1
        assert lines[0].endswith("as one GPU said: CUDA driver error: system not yet initialized")


@pytest.mark.parametrize("tokens", [[3, 5], [4, 0, 7], [0, 0, 2, 9]])
def test_rows_of_all_ranks_lie_side_by_side(tokens: list[int]) -> None:
    ranks = len(tokens)
    places: dict[str, list[list[range]]] = {"there": [[] for _ in tokens], "back": [[] for _ in tokens]}
    for own, count in enumerate(tokens):
        group = type("Group", (), {"rank": lambda self, own=own: own})()
        sent = [0 if rank == own else count for rank in range(ranks)]
        received = [0 if rank == own else number for rank, number in enumerate(tokens)]
        traffic = Traffic(group, sent, received, any_active=True, rows=None)
        for rank in range(ranks):
            if rank != own:
                first = traffic.starts("there")[rank]
                places["there"][rank].append(range(first, first + count))
                first = traffic.starts("back")[rank]
                places["back"][rank].append(range(first, first + tokens[rank]))
    for way, of_ranks in places.items():
        for rank, found in enumerate(of_ranks):
            rows = [row for one in found for row in one]
            total = sum(tokens) - tokens[rank] if way == "there" else (ranks - 1) * tokens[rank]
            assert rows == list(range(total)), (way, rank)
