"""What a process learns from the variables of its launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from rxt_dist.errors import ConfigError
from rxt_dist.parallel.bootstrap import share_cores, world_from_environment

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_process_without_a_launcher_is_a_world_of_one() -> None:
    world = world_from_environment()
    assert (world.rank, world.local_rank, world.size) == (0, 0, 1)
    assert world.device == torch.device("cpu")
    assert world.is_main


def test_the_variables_of_a_launcher_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("5", "1", "8"), strict=True):
        monkeypatch.setenv(name, value)
    world = world_from_environment()
    assert (world.rank, world.local_rank, world.size) == (5, 1, 8)
    assert not world.is_main


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "one", "-1", "1.5"])
def test_a_variable_that_is_no_number_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} is '{value}'"):
        world_from_environment()


class TestCores:
    """Threads of a rank, on a machine of twelve cores."""

    @pytest.fixture(autouse=True)
    def _twelve_cores(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"])
    @pytest.mark.parametrize(("ranks", "threads"), [("1", 12), ("5", 2), ("12", 1), ("16", 1), ("4(x2)", 12)])
    def test_ranks_of_a_node_share_them(
        self, monkeypatch: pytest.MonkeyPatch, name: str, ranks: str, threads: int
    ) -> None:
        monkeypatch.setenv(name, ranks)
        share_cores()
        assert torch.get_num_threads() == threads

    def test_the_environment_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "7")  # read by PyTorch when it was loaded
        monkeypatch.setenv("LOCAL_SIZE", "4")
        share_cores()
        assert torch.get_num_threads() == 3
