"""Which rank saves what lanes carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxt_dist.parallel.bootstrap import World
from rxt_dist.train.feed import LaneFeed


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
