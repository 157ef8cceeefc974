"""A model of one rank out of a whole one: what is replaced, and what DeepSpeed must know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from rxt_dist.model import RxTModel
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.experts import ExpertParallel
from rxt_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def parallelize(model: RxTModel, mesh: Mesh, rank: int) -> None:
    """Leave in ``model`` what ``rank`` holds of it on ``mesh``. Collective.

    The model comes whole and without values (on the meta device) and is filled afterwards: initial values
    and loaded ones are the same on every mesh.

    Experts are dealt out over the expert group; everything else is a copy on every rank.
    """
    if mesh.expert_size > 1:
        group = _expert_group(mesh, rank)
        for part in list(model.modules()):
            if isinstance(part, MoE):
                part.experts = ExpertParallel(part.experts, mesh, rank, group)


def spread_experts(model: nn.Module) -> list[ExpertParallel]:
    """The expert modules of ``model`` of which this rank holds a part only."""
    return [part for part in model.modules() if isinstance(part, ExpertParallel)]


def group_name(experts: ExpertParallel) -> str:
    """Under which DeepSpeed keeps the groups of these experts."""
    return _group_name(experts.group.size())


def tag_experts(model: nn.Module) -> set[nn.Parameter]:
    """Mark the spread experts' parameters for DeepSpeed, and return them.

    Their gradients are summed only over the ranks that hold the same experts. With gradients that are
    summed over ranks and not averaged, this is right as it is: the rows of all other ranks have come to
    these experts, so that each copy has the gradient of what its expert group computed.
    """
    tagged = set()
    for experts in spread_experts(model):
        for parameter in experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name(experts)  # type: ignore[attr-defined]
            tagged.add(parameter)
    return tagged


def _group_name(expert_size: int) -> str:
    return f"ep_size_{expert_size}"


def _expert_group(mesh: Mesh, rank: int) -> ProcessGroup:
    """The process group of the rank's expert group, made with DeepSpeed, which needs it by name."""
    from deepspeed.utils import groups

    name = _group_name(mesh.expert_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(mesh.expert_size)
    found: ProcessGroup = groups._get_expert_parallel_group(name)
    where = mesh.coordinates(rank)
    assert tuple(dist.get_process_group_ranks(found)) == mesh.expert_groups()[where.edp]
    same = groups._get_expert_data_parallel_group(name)
    assert tuple(dist.get_process_group_ranks(same)) == mesh.expert_data_groups()[where.ep]
    return found
