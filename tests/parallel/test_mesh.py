"""The arithmetic of meshes against definitions by membership."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxt_dist.errors import MeshError
from rxt_dist.parallel.mesh import Mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    world = draw(st.integers(1, 64))
    fitting = [size for size in range(1, world + 1) if world % size == 0]
    return Mesh(world, draw(st.sampled_from(fitting)), draw(st.sampled_from(fitting)))


@given(meshes())
def test_groups_are_the_ranks_that_share_a_coordinate(mesh: Mesh) -> None:
    where = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    for groups, own, other in (
        (mesh.tensor_groups(), "tp", "dp"),
        (mesh.data_groups(), "dp", "tp"),
        (mesh.expert_groups(), "ep", "edp"),
        (mesh.expert_data_groups(), "edp", "ep"),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        for group in groups:
            assert len({getattr(where[rank], other) for rank in group}) == 1
            assert [getattr(where[rank], own) for rank in group] == list(range(len(group)))


@given(meshes())
def test_sizes(mesh: Mesh) -> None:
    assert {len(group) for group in mesh.tensor_groups()} == {mesh.tensor_size}
    assert {len(group) for group in mesh.data_groups()} == {mesh.dp_size}
    assert {len(group) for group in mesh.expert_groups()} == {mesh.expert_size}
    assert {len(group) for group in mesh.expert_data_groups()} == {mesh.expert_data_size}
    assert mesh.dp_size * mesh.tensor_size == mesh.expert_size * mesh.expert_data_size == mesh.world_size


@given(meshes(), st.integers(1, 4))
def test_every_expert_is_held_once_in_every_expert_group(mesh: Mesh, count: int) -> None:
    experts = mesh.expert_size * count
    for group in mesh.expert_groups():
        held = [expert for rank in group for expert in mesh.experts_of(rank, experts)]
        assert held == list(range(experts))
    for group in mesh.expert_data_groups():
        assert len({mesh.experts_of(rank, experts) for rank in group}) == 1


def test_tensor_and_expert_groups_span_consecutive_ranks() -> None:
    mesh = Mesh(8, tensor_size=2, expert_size=4)
    assert mesh.tensor_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert mesh.data_groups() == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert mesh.expert_groups() == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert mesh.expert_data_groups() == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert mesh.coordinates(5) == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 4, 1), "parallel.tensor_size: found 4; must divide the world size (6 ranks)"),
        ((6, 1, 4), "parallel.expert_size: found 4; must divide the world size (6 ranks)"),
        ((4, 0, 1), "parallel.tensor_size: found 0; must divide the world size (4 ranks)"),
        ((0, 1, 1), "world size: found 0 ranks; valid: 1 or more"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(MeshError) as caught:
        Mesh(*sizes)
    assert str(caught.value) == message
