"""Which rank saves what lanes carry, and what is said of the datasets."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rxt_dist.data.conversations import MixedConversations
from rxt_dist.parallel.bootstrap import World
from rxt_dist.train.feed import LaneFeed, report_shares


@pytest.mark.parametrize(("rank", "lanes"), [(0, [0, 1]), (1, []), (2, [2, 3]), (3, [])])
def test_ranks_that_share_tensors_save_their_lanes_once(rank: int, lanes: list[int]) -> None:
    world = World(rank, rank, 4, torch.device("cpu"), tensor_size=2)
    assert (world.dp_rank, world.dp_size) == (rank // 2, 2)
    nothing: Any = None  # neither loader nor damage is asked
    stm = torch.randn(3, 2, 4, 5)
    feed = LaneFeed(nothing, nothing, 2 * world.dp_rank, stm, saves=world.is_first_of_tensor_group)
    found = feed.fragments()
    assert list(found) == [f"stm.lane-{lane:06d}" for lane in lanes]
    for column, fragment in enumerate(found.values()):
        ((offsets, values),) = fragment.chunks
        assert offsets == (0,)
        assert torch.equal(values, stm[:, column].flatten())


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_lanes_carry_what_their_micro_batch_brought(micro: int) -> None:
    nothing: Any = None
    first = 4
    feed = LaneFeed(nothing, nothing, first, torch.zeros(3, 4, 2, 5), saves=True)
    brought = torch.randn(3, 4, 2, 5, requires_grad=True)
    for lane in range(0, 4, micro):
        batch: Any = SimpleNamespace(lanes=np.arange(micro), first_lane=first + lane)
        feed.carry(batch, brought[:, lane : lane + micro])
        carried = feed.stm(batch)
        assert torch.equal(carried, brought[:, lane : lane + micro])
        assert not carried.requires_grad
    for lane, fragment in enumerate(feed.fragments().values()):
        ((_, values),) = fragment.chunks
        assert torch.equal(values, brought[:, lane].flatten())


def test_weights_are_told_in_interactions(caplog: pytest.LogCaptureFixture) -> None:
    """Twice as many conversations, half as long: as many interactions."""
    caplog.set_level(logging.INFO)
    counts = {"short": [2, 2, 2, 2], "long": [3, 5, 4], "rest": [1, 3, 2]}
    source = MixedConversations.__new__(MixedConversations)
    source.parts = [  # type: ignore[assignment]
        SimpleNamespace(dataset=SimpleNamespace(name=name), interaction_counts=np.array(own, dtype=np.uint32))
        for name, own in counts.items()
    ]
    source.weights = [2, 1, 1]
    report_shares(source)
    assert [record.getMessage() for record in caplog.records] == [
        "short: 50.0 % of the conversations, 40.0 % of the interactions of this stage",
        "long: 25.0 % of the conversations, 40.0 % of the interactions of this stage",
        "rest: 25.0 % of the conversations, 20.0 % of the interactions of this stage",
    ]
    caplog.clear()
    one: Any = source.parts[0]
    report_shares(one)
    assert not caplog.records
