"""The experts of a whole layer, spread over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from rxt_dist.model.moe import MoE
from rxt_dist.parallel.expert_messages import PassSizes
from rxt_dist.parallel.experts import ExpertParallel
from rxt_dist.parallel.mesh import Mesh


def spread_experts(layer: MoE, sizes: PassSizes | None = None) -> ExpertParallel:
    """Leave in ``layer`` the experts of this rank, with their values. Collective over all ranks."""
    ranks, rank, whole = dist.get_world_size(), dist.get_rank(), layer.experts
    group = dist.new_group(list(range(ranks)))
    mesh = Mesh(ranks, expert_size=ranks)
    experts = ExpertParallel(whole, layer.config.top_k, mesh, rank, group, sizes or PassSizes(group))
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.copy_(whole.get_parameter(name)[experts.held])
    layer.experts = experts
    return experts
