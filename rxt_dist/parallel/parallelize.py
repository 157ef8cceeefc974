"""A model of one rank out of a whole one: what is replaced, and what DeepSpeed must know of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from rxt_dist.model import RxTModel
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.layer import Layer
from rxt_dist.model.memory_attention import StackedAttention
from rxt_dist.model.moe import Experts, MoE
from rxt_dist.parallel.collectives import set_data_group
from rxt_dist.parallel.expert_messages import PassSizes, told
from rxt_dist.parallel.experts import ExpertParallel
from rxt_dist.parallel.groups import MeshGroups, open_groups, open_hosts
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.regions import summed
from rxt_dist.parallel.rooms import Trial
from rxt_dist.parallel.spread_layer import SpreadDecoder, SpreadLayer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rxt_dist.parallel.tensor_layers import TensorRank


@dataclass(frozen=True)
class Placement:
    """Where a model is that :func:`parallelize` has reduced."""

    mesh: Mesh
    rank: int
    groups: MeshGroups | None
    """Groups of the tensor and data axes; None where no tensors are shared."""


def parallelize(model: RxTModel, mesh: Mesh, rank: int) -> None:
    """Leave in ``model`` what ``rank`` holds of it on ``mesh``. Collective.

    The model comes whole and without values (on the meta device) and is filled afterwards: initial values
    and loaded ones are the same on every mesh.

    Attention heads, hidden channels and the vocabulary are dealt out over the tensor group, experts over the
    expert group; everything else is a copy on every rank. With sequence parallelism the ranks of a tensor
    group also divide the tokens between the layers' products.
    """
    groups = None
    if mesh.tensor_size > 1:
        from rxt_dist.parallel.tensor_layers import Pass, TensorRank

        groups = open_groups(mesh, rank)
        sliced = Pass() if mesh.sequence_parallel else None
        share_tensors(model, TensorRank(mesh.coordinates(rank).tp, mesh.tensor_size, groups.tensor, sliced))
    set_data_group(None if groups is None else groups.data)
    if mesh.expert_size > 1:
        group = _expert_group(mesh, rank)
        hosts = open_hosts(mesh, rank)
        # Ranks that share tensors would have to agree with everyone that one of them meets.
        trial = Trial(lambda fits: all(told([int(fits)], hosts))) if mesh.tensor_size == 1 else None
        for layers in [part for part in model.modules() if isinstance(part, nn.ModuleList)]:
            sizes = PassSizes(hosts)
            for number, layer in enumerate(layers):
                if isinstance(layer, Layer) and isinstance(layer.feed_forward, MoE):
                    moe = layer.feed_forward
                    moe.experts = ExpertParallel(
                        moe.experts, moe.config.top_k, mesh, rank, group, sizes, trial
                    )
                    layers[number] = SpreadLayer(layer)
        if trial is not None and any(part.all_travel for part in spread_experts(model)):
            model.decoder = SpreadDecoder(model.decoder, trial)
    elif mesh.tensor_size > 1 and any(isinstance(part, MoE) for part in model.modules()):
        _expert_group(mesh, rank)  # of one rank each: their copies on all ranks sum gradients
    model.placement = Placement(mesh, rank, groups)  # type: ignore[assignment]


def share_tensors(model: RxTModel, tensor: TensorRank) -> None:
    """Leave in ``model`` the part of one of the ranks that share its tensors.

    Copies stay: norms, routers, gates of the memory, biases behind a sum, and the memory cross-attention of
    encoders, which is never run in training.
    """
    from rxt_dist.parallel.sequence import SlicedDecoder, SlicedEncoder, SlicedMemoryAttention
    from rxt_dist.parallel.tensor_attention import (
        TensorCrossAttention,
        TensorSelfAttention,
        TensorStackedAttention,
    )
    from rxt_dist.parallel.tensor_layers import VocabEmbedding
    from rxt_dist.parallel.tensor_moe import SlicedMoE, split_feed_forward
    from rxt_dist.parallel.tensor_vocab import TensorLMHead, TensorMLMHead

    decoder = model.decoder
    model.encoder.embedding = decoder.embedding = VocabEmbedding(decoder.embedding, tensor)
    for layer in (*decoder.stateless_layers, *decoder.layers, *decoder.final_stateless_layers):
        if layer.cross_attention is not None:
            layer.cross_attention = TensorCrossAttention(layer.cross_attention, tensor)
    for layer in [part for part in model.modules() if isinstance(part, Layer)]:
        layer.attention = TensorSelfAttention(layer.attention, tensor)
        if isinstance(layer.feed_forward, FeedForward):
            split_feed_forward(layer.feed_forward, tensor)
        else:
            layer.feed_forward = SlicedMoE(layer.feed_forward, tensor)
    for name, part in list(model.memory_attention.named_children()):
        if isinstance(part, StackedAttention):
            shared = TensorStackedAttention(part, tensor, of_tokens=name == "attention")
            setattr(model.memory_attention, name, shared)
    decoder.lm_head = TensorLMHead(decoder.lm_head, tensor)
    model.mlm_head = TensorMLMHead(model.mlm_head, tensor)
    if tensor.sliced is not None:
        model.encoder = SlicedEncoder(model.encoder, tensor)
        model.decoder = SlicedDecoder(decoder, tensor)
        model.memory_attention = SlicedMemoryAttention(model.memory_attention, tensor)


def placement(model: nn.Module) -> Placement:
    """What :func:`parallelize` left with ``model``; a whole model is a copy on every rank."""
    found: Placement | None = getattr(model, "placement", None)
    return found or Placement(Mesh(dist.get_world_size()), dist.get_rank(), None)


def spread_experts(model: nn.Module) -> list[ExpertParallel]:
    """The expert modules of ``model`` of which this rank holds a part only."""
    return [part for part in model.modules() if isinstance(part, ExpertParallel)]


def experts_with_groups(model: nn.Module) -> list[Experts]:
    """The expert modules whose gradients are summed over other ranks than those of everything else.

    That are spread experts, and where tensors are shared all others too: each tensor-parallel rank sends its
    own tokens through them.
    """
    mesh = placement(model).mesh
    if mesh.expert_size == 1 and mesh.tensor_size == 1:
        return []
    return [part.experts for part in model.modules() if isinstance(part, MoE)]


def split_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that hold other elements on every rank of a tensor or expert group."""
    for prefix, module in model.named_modules():
        cuts = getattr(module, "cuts", None)
        for name in () if cuts is None else cuts():
            yield f"{prefix}.{name}", module.get_parameter(name)


def tag_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Mark the parameters of ``model`` for DeepSpeed; returns those of experts with groups of their own.

    Gradients of experts are summed only over the ranks that hold the same experts. With gradients that are
    summed over ranks and not averaged, this is right as it is: the rows of all other ranks have come to
    these experts, so that each copy has the gradient of what its expert group computed.

    The global norm counts parameters that hold other elements, or sum over other tokens, on every rank of a
    tensor group on all of them, and copies on the first. Copies that see a part of the computation only have
    their gradients summed over the tensor group first.
    """
    where = placement(model)
    experts = {p for module in experts_with_groups(model) for p in module.parameters()}
    for parameter in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name(where.mesh)  # type: ignore[attr-defined]
    for parameter in {*experts, *(parameter for _, parameter in split_parameters(model))}:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    if where.groups is not None:
        for parameter in partial_parameters(model):
            _sum_gradient(parameter, where.groups.tensor)
    return experts


def partial_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained copies of which each rank of a tensor group sees a part of the computation."""
    for module in model.modules():
        partial = getattr(module, "partial_parameters", None)
        for name in () if partial is None else partial():
            parameter = module.get_parameter(name)
            if parameter.requires_grad:
                yield parameter


def first_holders(model: nn.Module) -> set[str]:
    """Names of the parameters whose elements this rank is the first one to hold."""
    where = placement(model)
    at = where.mesh.coordinates(where.rank)
    spread = {id(parameter) for module in spread_experts(model) for parameter in module.parameters()}
    split = {id(parameter) for _, parameter in split_parameters(model)} - spread
    found = set()
    for name, parameter in model.named_parameters():
        others = at.edp if id(parameter) in spread else at.dp if id(parameter) in split else where.rank
        if others == 0:
            found.add(name)
    return found


def _sum_gradient(parameter: nn.Parameter, group: ProcessGroup) -> None:
    def over_group(gradient: torch.Tensor) -> torch.Tensor:
        return summed(gradient, group)

    parameter.register_hook(over_group)  # type: ignore[no-untyped-call]


def group_name(mesh: Mesh) -> str:
    """Under which DeepSpeed keeps the expert groups of a mesh."""
    return f"ep_size_{mesh.expert_size}"


def _expert_group(mesh: Mesh, rank: int) -> ProcessGroup:
    """The process group of the rank's expert group, made with DeepSpeed, which needs it by name."""
    from deepspeed.utils import groups

    name = group_name(mesh)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(mesh.expert_size)
    found: ProcessGroup = groups._get_expert_parallel_group(name)
    where = mesh.coordinates(rank)
    assert tuple(dist.get_process_group_ranks(found)) == mesh.expert_groups()[where.edp]
    same = groups._get_expert_data_parallel_group(name)
    assert tuple(dist.get_process_group_ranks(same)) == mesh.expert_data_groups()[where.ep]
    return found
