"""Optimizer steps of small models by engines on the ranks of a mesh.

helpers/plain_steps.py makes the same ones by autograd in one process. Both start from the same whole model
and see the same data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed, start_engine
from helpers.lanes import (
    SETTINGS,
    MemoryPieces,
    random_conversations,
    windows,
)

from rxt_dist.config import RunConfig, load_config
from rxt_dist.data.batch import MaskPlan, TextBatch, build_text_batch
from rxt_dist.data.order import Pack
from rxt_dist.data.pieces import Piece
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import RxTModel, build_model
from rxt_dist.model.canonical import CanonicalPart, canonical_parts, named_tensors
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import parallelize
from rxt_dist.train.engine import StageEngine

UNITS, STEPS, WINDOW, CLIP = 8, 3, 2, 0.05
MASK_ID, FIRST_WORD = 4, 7
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"type": "SGD", "params": {"lr": 0.5}},
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "torch_adam": True}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "shared expert": {},
    "top 1, unused expert": {"top_k": 1, "num_shared_experts": 0},
    "global bias, two shared": {"bias": "global", "num_shared_experts": 2},
    "no bias": {"bias": "off"},
    "eight experts": {"num_experts": 8, "top_k": 3},
    "switch, z": {"aux_loss": "switch", "aux_loss_scale": 0.5, "z_loss_weight": 0.02},
    "selection bias": {"bias_update_rate": 0.03},
    "switch, z, bias, top 1": {
        "aux_loss": "switch",
        "aux_loss_scale": 0.5,
        "z_loss_weight": 0.02,
        "bias_update_rate": 0.03,
        "top_k": 1,
    },
}
_ATTENTIONS = (
    "encoder.attention",
    "decoder.attention",
    "decoder.cross_attention",
    "memory_attention.attention",
    "memory_attention.interlayer_attention",
)
HEADS = {
    "as tiny": None,
    "one kv head, gated": "{query_heads: 4, kv_heads: 1, gated: true, qk_norm: true}",
    "reverse": "{query_heads: 2, kv_heads: 4, qk_norm: true, output_bias: false}",
}
"""What all attentions of a case have; None: each its own."""
# So small a model would stay whole on every rank.
CUT_EVERYTHING = (
    "stage3_param_persistence_threshold",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
)
STAGES = {
    "joint_lm": f"{{name: joint_lm, steps: {STEPS}}}",
    "smat": f"{{name: smat, steps: {STEPS}}}",
    "smat, frozen decoder": f"{{name: smat, steps: {STEPS}, frozen: [decoder]}}",
    "smat, decoder joins": f"{{name: smat, steps: {STEPS}, unfreeze: {{decoder: 1}}}}",
    "memory_attention": f"{{name: memory_attention, steps: {STEPS}, stm_difference_scale: 0.3}}",
    "context_sft": f"{{name: context_sft, steps: {STEPS}}}",
    "smat, always fresh": f"{{name: smat, steps: {STEPS}}}",
}


class Case(NamedTuple):
    """One engine on one mesh."""

    stage: str
    world: int
    expert_size: int
    zero: int = 1
    accumulation: int = 1
    variant: str = "shared expert"
    recompute: str = "none"
    settings: tuple[tuple[str, Any], ...] = ()
    """Other settings of the run."""
    tensor_size: int = 1
    heads: str = "as tiny"
    sequence: bool = False
    """Whether tensor-parallel ranks divide the tokens between products."""

    @property
    def dp_size(self) -> int:
        return self.world // self.tensor_size

    def config(self) -> RunConfig:
        return _config(self)


@cache
def _config(case: Case) -> RunConfig:
    micro = UNITS // (case.dp_size * case.accumulation)
    values = SETTINGS | {
        "model.embed_dim": 32,
        "stages": f"[{STAGES[case.stage]}]",
        "batch.packs": UNITS,
        "batch.micro_packs": micro,
        "batch.lanes": UNITS,
        "batch.micro_lanes": micro,
        "batch.window": WINDOW,
        "zero.stage": case.zero,
        "parallel.expert_size": case.expert_size,
        "parallel.tensor_size": case.tensor_size,
        "parallel.sequence_parallel": case.sequence,
        "runtime.recompute": case.recompute,
        "optimizer": f"{{clip_norm: {CLIP}, schedule: constant}}",
        **{f"model.decoder.moe.{name}": value for name, value in VARIANTS[case.variant].items()},
    }
    heads = HEADS[case.heads]
    if heads is not None:
        values |= {f"model.{name}": heads for name in _ATTENTIONS}
    if case.zero == 3:
        values |= {f"deepspeed.zero_optimization.{name}": 0 for name in CUT_EVERYTHING}
    values |= dict(case.settings)
    return load_config("tiny", [f"{name}={value}" for name, value in values.items()], require_data=False)


class Pieces:
    """Short pieces of random words."""

    fingerprint = "random"
    lengths = np.array([5, 3, 4, 6, 2, 5, 4, 3], dtype=np.int32)
    supervised = lengths - 1

    def read(self, piece: int) -> Piece:
        tokens = np.random.default_rng(piece).integers(FIRST_WORD, 41, self.lengths[piece])
        return Piece(tokens, 1)

    def read_tokens(self, pieces: np.ndarray) -> np.ndarray:
        return np.concatenate([self.read(piece).tokens for piece in pieces.tolist()])


def text_batch(case: Case, packs: range, step: int) -> TextBatch:
    """Packs of one piece each; of several micro-batches of a step the second half has no masked token."""
    masked = packs.start < UNITS // 2 or case.dp_size * case.accumulation == 1
    pack = Pack(np.array(packs, dtype=np.int64), np.full(len(packs), step, dtype=np.int64))
    return build_text_batch(Pieces(), pack, MaskPlan(77, 0.5 if masked else 1e-12), MASK_ID)


def conversations(case: Case) -> MemoryPieces:
    """Enough for all steps; in stage "always fresh" none has a second interaction."""
    counts = [1] * 60 if case.stage.endswith("fresh") else [3, 1, 4, 2, 1, 5, 2, 3] * 4
    return MemoryPieces(random_conversations(counts, longest=2))


def whole_model(case: Case) -> RxTModel:
    """Parameters and biases off special values, decided routers; with "unused expert" no token chooses the
    last one."""
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    model = build_model(case.config().model, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for moe in model.modules():
            if isinstance(moe, MoE):
                rows = moe.router.proj.weight
                rows.mul_(6)
                if moe.router.selection_bias is not None:
                    moe.router.selection_bias.normal_(std=0.08, generator=generator)
                if "unused" in case.variant:
                    rows[-1] = rows[:-1].mean(0)  # the mean of all others is never above them all
    return model


def model_of_rank(case: Case, whole: RxTModel, rank: int) -> RxTModel:
    mesh = Mesh(case.world, case.tensor_size, case.expert_size, case.sequence)
    model = build_model(case.config().model, 0, lambda one: parallelize(one, mesh, rank))
    source = canonical_values(whole, named_tensors(whole))
    target = named_tensors(model)
    with torch.no_grad():
        for name, parts in canonical_parts(model).items():
            flat = target[name].view(-1)
            for part in parts:
                part.of(flat).copy_(part.taken_from(source[part.name]))
    return model


def text_steps(case: Case, engine: StageEngine, rank: int) -> Iterator[list[tuple[Any, dict[str, int]]]]:
    share = UNITS // case.dp_size
    size = share // case.accumulation
    for step in range(STEPS):
        packs = [text_batch(case, range(unit, unit + 1), step) for unit in range(UNITS)]
        counts: dict[str, int] = {}
        for pack in packs:
            for name, count in engine.module.local_counts(pack).items():
                counts[name] = counts.get(name, 0) + count
        own = range(rank * share, (rank + 1) * share, size)
        yield [(text_batch(case, range(first, first + size), step), counts) for first in own]


def lane_steps(case: Case, rank: int) -> Iterator[list[tuple[Any, dict[str, int]]]]:
    micro = UNITS // (case.dp_size * case.accumulation)
    with windows(
        conversations(case),
        window=WINDOW,
        lanes=UNITS,
        rank=rank,
        ranks=case.dp_size,
        micro=micro,
        look_back=case.stage != "memory_attention",
    ) as steps:
        for _ in range(STEPS):
            step = next(steps)
            yield [(batch, step.counts) for batch in step.batches]


def run_on_ranks(folder: Path, cases: list[tuple[int, Case, str]]) -> None:
    """On every rank: train all cases, each with an optimizer, and write down what came of it."""
    join_deepspeed()
    rank = dist.get_rank()
    for number, case, optimizer in cases:
        found = _train(case, model_of_rank(case, whole_model(case), rank), optimizer, rank)
        torch.save(found, folder / f"{number}-{rank}.pt")


def _train(case: Case, model: RxTModel, optimizer: str, rank: int) -> dict[str, Any]:
    config = case.config()
    parts = canonical_parts(model)  # while weights are whole
    engine = start_engine(config, model, {"optimizer": OPTIMIZERS[optimizer]})
    rate = OPTIMIZERS[optimizer]["params"]["lr"]
    share = UNITS // case.dp_size
    stm = torch.zeros(2, share, config.model.stm_size, 32)
    found: dict[str, Any] = {"loss": [], "norm": [], "gradients": []}
    rank //= case.tensor_size  # of its data-parallel group from here on
    steps = text_steps(case, engine, rank) if case.stage == "joint_lm" else lane_steps(case, rank)
    for number, batches in enumerate(steps):
        engine.begin_step(number, {start: rate * (number >= start) for start in engine.group_starts})
        losses = []
        for index, (batch, counts) in enumerate(batches):
            columns = slice(0, 0)
            if case.stage != "joint_lm":
                first = batch.first_lane - rank * share
                columns = slice(first, first + len(batch.lanes))
            loss, metrics, carried = engine.forward(batch, counts, stm[:, columns])
            engine.backward(loss)
            if index == len(batches) - 1:
                found["gradients"].append(reduced_gradients(engine, model, parts))
            engine.engine.step()
            if carried is not None:
                stm[:, columns] = carried
            losses.append(metrics[0].item())
        engine.end_step()
        found["loss"].append(sum(losses))
        found["norm"].append(engine.gradient_norm())
    found["fragments"] = {
        key: (one.shape, [(list(where), values.clone()) for where, values in one.chunks])
        for key, one in engine.owned_fragments().items()
    }
    found["shapes"] = engine.tensor_shapes()
    found["buffers"] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine.close()
    return found


def reduced_gradients(
    engine: StageEngine, model: RxTModel, parts_of: dict[str, list[CanonicalPart]]
) -> dict[str, list[Any]]:
    """Reduced gradients before clipping, by canonical name: boxes with their places in the whole tensor."""
    from deepspeed.utils import safe_get_full_grad

    zero = engine.engine.optimizer
    cut = hasattr(zero, "fp16_groups")
    trained = {id(p) for group in (zero.fp16_groups if cut else zero.bit16_groups) for p in group}
    whole = {} if cut or not is_flat(zero) else _gathered_gradients(zero)
    found: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            continue
        if id(parameter) in whole:
            flat = whole[id(parameter)]
        else:
            flat = (safe_get_full_grad(parameter) if cut else parameter.get_full_hp_grad()).view(-1)  # type: ignore[attr-defined]
        for part in parts_of[name]:
            box = part.of(flat).view(part.box.sizes).clone()
            found.setdefault(part.name, []).append((list(part.box.starts), box))
    return found


def is_flat(zero: Any) -> bool:
    """Whether the gradients of a ZeRO optimizer lie in flat tensors that we fill."""
    return not zero.partition_gradients and hasattr(zero.averaged_gradients.get(0), "flat_partition")


def _gathered_gradients(zero: Any) -> dict[int, torch.Tensor]:
    """Of a ZeRO 1 optimizer: flat gradients by the id of their parameter, joined from all partitions."""
    found = {}
    for number, parameters in enumerate(zero.bit16_groups):
        own = zero.averaged_gradients[number].flat_partition
        ranks = zero.real_dp_process_group[number]
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(ranks))]
        dist.all_gather(parts, own.contiguous(), group=ranks)
        sizes = [parameter.numel() for parameter in parameters]
        flat = torch.cat(parts)[: sum(sizes)]
        found |= {id(p): piece for p, piece in zip(parameters, flat.split(sizes), strict=True)}
    return found


def canonical_values(model: RxTModel, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``values`` of parameters of a whole model by canonical name."""
    return {
        part.name: part.of(values[name].reshape(-1)).view(part.shape)
        for name, parts in canonical_parts(model).items()
        if name in values
        for part in parts
    }
