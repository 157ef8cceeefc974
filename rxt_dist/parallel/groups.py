"""Process groups of the tensor and data axes, and how DeepSpeed is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from rxt_dist.parallel.mesh import Mesh, Ranks

_open: dict[Mesh, MeshGroups] = {}
_hosts: dict[Mesh, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class MeshGroups:
    """This rank's groups of a mesh whose tensors are shared, with the methods by which DeepSpeed asks a
    Megatron-style "model parallel unit" for them."""

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size()

    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return self.data.size()

    def get_data_parallel_rank(self) -> int:
        return self.data.rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data)


def open_groups(mesh: Mesh, rank: int) -> MeshGroups:
    """The groups of ``rank``, made when they are first asked for. Collective then."""
    if mesh not in _open:
        _open[mesh] = MeshGroups(own_group(mesh.tensor_groups(), rank), own_group(mesh.data_groups(), rank))
    return _open[mesh]


def open_hosts(mesh: Mesh, rank: int) -> dist.ProcessGroup:
    """The expert group of ``rank`` for tensors of its hosts, made when first asked for. Collective then."""
    if mesh not in _hosts:
        _hosts[mesh] = own_group(mesh.expert_groups(), rank, backend="gloo")
    return _hosts[mesh]


def own_group(groups: Sequence[Ranks], rank: int, backend: str | None = None) -> dist.ProcessGroup:
    """The one of ``groups`` that ``rank`` is in; all of them are made. Collective."""
    made = {ranks: dist.new_group(list(ranks), backend=backend) for ranks in groups}
    found: dist.ProcessGroup = next(group for ranks, group in made.items() if rank in ranks)
    return found
