"""Which meshes fit a run, checked before any process group exists."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from rxt_dist.config.base import divisors, listed
from rxt_dist.config.model import AttentionConfig, ModelConfig
from rxt_dist.errors import MeshError

if TYPE_CHECKING:
    from rxt_dist.config.run import RunConfig
    from rxt_dist.config.stage import StageConfig


class StepUnits(NamedTuple):
    """What the optimizer steps of a stage are dealt out in: packs of text, or lanes of conversations."""

    field: str
    """Field of ``batch`` with the units of every step, over all ranks."""
    micro_field: str
    """Field of ``batch`` with the units that a rank processes at once."""
    total: int
    micro: int | str


def step_units(config: RunConfig, stage: StageConfig) -> StepUnits:
    """The units of ``stage``; ``batch.lanes`` is set where a stage needs it."""
    batch = config.batch
    if stage.uses_lanes:
        assert batch.lanes is not None
        return StepUnits("lanes", "micro_lanes", batch.lanes, batch.micro_lanes)
    return StepUnits("packs", "micro_packs", batch.packs, batch.micro_packs)


def check_world_size(config: RunConfig, world_size: int) -> int:
    """Check that ``config`` can run on ``world_size`` ranks; returns the data-parallel size.

    Raises:
        MeshError: a parallel size does not fit the number of ranks, of experts, of heads or of hidden
            channels, or the packs or lanes of a step cannot be dealt out evenly.
    """
    _check_experts(config, world_size)
    _check_tensors(config, world_size)
    tensor_size = config.parallel.tensor_size
    for stage in config.stages:
        field, micro_field, total, given = step_units(config, stage)
        micro = 1 if isinstance(given, str) else given
        valid = [dp * tensor_size for dp in divisors(total // micro)]
        if world_size not in valid:
            share = f"batch.{field} ({total})" + ("" if micro == 1 else f" / batch.{micro_field} ({micro})")
            raise MeshError(
                f"world size: found {world_size} ranks; the data-parallel size must divide {share}, "
                f"valid world sizes: {listed(valid)}"
            )
    return world_size // tensor_size


def _check_experts(config: RunConfig, world_size: int) -> None:
    size, moe = config.parallel.expert_size, config.model.decoder.moe
    if size == 1 or world_size < 1:
        return
    if moe is None:
        raise MeshError(
            f"parallel.expert_size: found {size}; model.decoder.moe is null, there are no experts to share, "
            "valid: 1"
        )
    valid = divisors(gcd(world_size, moe.num_experts))
    if size not in valid:
        raise MeshError(
            f"parallel.expert_size: found {size}; must divide the world size ({world_size} ranks) and "
            f"model.decoder.moe.num_experts ({moe.num_experts}), valid: {listed(valid)}"
        )


def _check_tensors(config: RunConfig, world_size: int) -> None:
    size = config.parallel.tensor_size
    if size == 1 or world_size < 1:
        return
    counts = {f"the world size ({world_size} ranks)": world_size}
    counts |= {f"{name} ({count})": count for name, count in shared_counts(config.model).items()}
    for name, count in counts.items():
        if count % size:
            valid = listed(divisors(gcd(*counts.values())))
            raise MeshError(f"parallel.tensor_size: found {size}; must divide {name}, valid: {valid}")


def shared_counts(model: ModelConfig) -> dict[str, int]:
    """What tensor-parallel ranks divide evenly, by the fields that say how many there are.

    Of an attention that are its query heads or its key/value heads, whichever are more.
    """
    counts = {}
    for name in ("encoder", "decoder", "memory_attention"):
        component = getattr(model, name)
        for field in type(component).model_fields:
            heads = getattr(component, field)
            if isinstance(heads, AttentionConfig) and field != "memory_cross_attention":
                larger = "kv_heads" if heads.kv_heads > heads.query_heads else "query_heads"
                counts[f"model.{name}.{field}.{larger}"] = getattr(heads, larger)
    decoder = model.decoder
    counts["model.encoder.ff_dim"] = model.encoder.ff_dim
    if decoder.moe is None or (decoder.moe.num_shared_experts and decoder.moe.shared_expert_dim is None):
        counts["model.decoder.ff_dim"] = decoder.ff_dim
    elif decoder.moe.shared_expert_dim is not None:
        counts["model.decoder.moe.shared_expert_dim"] = decoder.moe.shared_expert_dim
    if "dense" in (*decoder.stateless_layers, *decoder.final_stateless_layers):
        counts["model.decoder.dense_layer_dim"] = decoder.dense_layer_dim
    return counts


def micro_units(config: RunConfig, stage: StageConfig, dp_size: int) -> int:
    """Packs or lanes that one rank processes at once, with ``auto`` filled in."""
    units = step_units(config, stage)
    return units.total // dp_size if isinstance(units.micro, str) else units.micro


def accumulation_steps(config: RunConfig, stage: StageConfig, dp_size: int) -> int:
    """Micro-batches of one rank in one optimizer step."""
    return step_units(config, stage).total // (dp_size * micro_units(config, stage, dp_size))
