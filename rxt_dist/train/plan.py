"""What a run needs on a mesh: groups, memory and communication of a rank, from the configuration alone.

Weights and optimizer state are exact. The rest is arithmetic over the most tokens that a step can have;
how each number comes about stands beside it, in ``BASIS``.

Shape legend: N tokens, D embedding width, K experts that a token visits, S STM slots, L memory layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from rxt_dist.config import (
    AttentionConfig,
    ModelConfig,
    RunConfig,
    SpecialTokens,
    StageConfig,
    accumulation_steps,
    check_world_size,
    deepspeed_config,
    micro_units,
    stage_optimizer,
)
from rxt_dist.config.mesh import step_units
from rxt_dist.config.run import stage_window
from rxt_dist.config.stage import ANSWER_STAGES
from rxt_dist.model.model import empty_model
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.dispatch import travelling
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import partial_parameters, share_tensors
from rxt_dist.stages import StageModule, build_stage
from rxt_dist.stages.base import uses
from rxt_dist.train.sequence_traffic import divided_rows
from rxt_dist.train.tensor_traffic import tensor_rows

_FP32_BYTES = 4
_OPTIMIZER_TENSORS = 3  # masters and two moments
_PARTITION_ALIGNMENT = 2  # elements; ZeRO pads every group to a multiple of this and of its ranks

# DeepSpeed's own values of what a run can set in its `deepspeed` block.
_MAX_LIVE_PARAMETERS = 1_000_000_000
_MAX_REUSE_DISTANCE = 1_000_000_000
_PREFETCH_BUCKET_SIZE = 50_000_000

# Sizes do not depend on which ids the special tokens have.
_ANY_TOKENS = SpecialTokens(pad=0, unk=1, bos=2, eos=3, mask=4, query=5, answer=6)

BASIS = {
    "weights": "parameters of the stage's components in the precision of the run (ZeRO 3: this rank's part "
    "of each, and small ones whole); exact",
    "gathered_weights": "ZeRO 3: weights of other ranks' parts that are held for a while, at most about",
    "gradients": "one gradient a trained parameter (ZeRO 2 and 3: of this rank's part, and one bucket)",
    "optimizer": "fp32 masters and two moments of this rank's part, with ZeRO's padding; exact",
    "host_optimizer": "the same in host memory, and fp32 gradients, where the optimizer is offloaded; exact",
    "lane_stm": "STM of this rank's lanes in fp32; exact",
    "activations": "tensors that the layers keep for the backward pass of a micro-batch of full packs, or of "
    "lanes of full interactions; without workspaces and the allocator's slack",
    "communication": "bytes that a rank sends in one optimizer step of full sequences, ring algorithms, "
    "experts evenly loaded (ZeRO 1 and 2: every rank gets whole sums of gradients, unless "
    "use_multi_rank_bucket_allreduce of deepspeed.zero_optimization is false; ZeRO 3: weights that no longer "
    "are held are gathered again); tensor_parallel: activations, their gradients, and those of copied heads",
}
"""How each number of a plan is made."""


def plan_run(config: RunConfig, world_size: int, vocab_size: int) -> dict[str, Any]:
    """The plan of a run as plain data: ``mesh``, and ``stages`` with bytes of memory and communication.

    ``vocab_size`` is that of the dataset; with 0, embedding and heads are left out.

    Raises:
        MeshError: the run does not fit ``world_size`` ranks.
    """
    check_world_size(config, world_size)
    mesh = Mesh(world_size, **config.parallel.model_dump())
    filled: dict[str, Any] = {"vocab_size": vocab_size}
    if not isinstance(config.model.special_tokens, SpecialTokens):
        filled["special_tokens"] = _ANY_TOKENS
    model_config = config.model.model_copy(update=filled)
    sized = config.model_copy(update={"model": model_config})
    return {
        "mesh": {
            "world_size": world_size,
            "dp_size": mesh.dp_size,
            "tensor_size": mesh.tensor_size,
            "expert_size": mesh.expert_size,
            "sequence_parallel": mesh.sequence_parallel,
            "data_groups": mesh.data_groups(),
            "tensor_groups": mesh.tensor_groups(),
            "expert_groups": mesh.expert_groups(),
            "expert_data_groups": mesh.expert_data_groups(),
        },
        "vocab_size": vocab_size,
        "stages": [_StagePlan(sized, stage, mesh).as_dict() for stage in config.stages],
        "basis": BASIS,
    }


class _StagePlan:
    """One stage on one rank; all ranks are alike."""

    def __init__(self, config: RunConfig, stage: StageConfig, mesh: Mesh) -> None:
        self.config, self.stage, self.mesh = config, stage, mesh
        self.element = 2 if config.precision == "bf16" else _FP32_BYTES
        self.model = empty_model(config.model)
        if mesh.tensor_size > 1:
            from rxt_dist.parallel.tensor_layers import Pass, TensorRank

            sliced = Pass() if mesh.sequence_parallel else None
            share_tensors(self.model, TensorRank(0, mesh.tensor_size, None, sliced))
        self.module: StageModule = build_stage(self.model, config, stage)
        self.module.freeze()
        self.experts: set[nn.Parameter] = set()
        """Parameters of experts that have groups of their own."""
        if mesh.expert_size > 1 or mesh.tensor_size > 1:
            self.experts = {p for moe in _moes(self.module) for p in moe.experts.parameters()}
        optimizer = stage_optimizer(config, stage)
        self.settings = deepspeed_config(config, stage, dp_size=mesh.dp_size, optimizer=optimizer)
        self.cut = config.zero.stage == 3
        self.accumulation = accumulation_steps(config, stage, mesh.dp_size)
        self.micro = micro_units(config, stage, mesh.dp_size)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.stage.name,
            "micro_batches": self.accumulation,
            "tokens_per_rank": self.micro_tokens * self.accumulation,
            "memory_bytes": {
                "weights": self.element * self._weight_elements(),
                "gathered_weights": self.element * self._gathered_elements(),
                "gradients": self._gradient_bytes(),
                "optimizer": 0 if self.offloaded else self._optimizer_bytes(_OPTIMIZER_TENSORS),
                "host_optimizer": self._optimizer_bytes(_OPTIMIZER_TENSORS + 1) if self.offloaded else 0,
                "lane_stm": self._lane_stm_bytes(),
                "activations": self._activation_elements() * self.element,
            },
            "communication_bytes": self._communication(),
        }

    @property
    def offloaded(self) -> bool:
        return self.config.zero.offload_optimizer == "cpu"

    @property
    def window(self) -> int:
        return stage_window(self.config, self.stage)

    @property
    def recomputed(self) -> int:
        """Positions of a window that pass forward once more in the backward pass."""
        recomputes = self.stage.uses_lanes and self.stage.name != "context_sft"
        return self.window - 1 if recomputes and self.config.runtime.recompute == "interaction" else 0

    @property
    def micro_tokens(self) -> int:
        """Most tokens of one micro-batch of a rank, through a whole window where there is one."""
        batch = self.config.batch
        if self.stage.uses_lanes:
            return self.micro * self.window * self.config.model.seq_len
        return self.micro * batch.pack_tokens

    def _held(self, parameters: Iterable[nn.Parameter]) -> int:
        """Elements that one rank holds of ``parameters``."""
        return sum(p.numel() // (self.mesh.expert_size if p in self.experts else 1) for p in set(parameters))

    def _partitions(self) -> list[tuple[int, int, int]]:
        """(elements, elements of one rank's part, ranks that share them) of every group of parameters."""
        found = []
        for group in self.module.parameter_groups().values():
            for ranks, members in (
                (self.mesh.dp_size, [p for p in group if p not in self.experts]),
                (self.mesh.expert_data_size, [p for p in group if p in self.experts]),
            ):
                if members:
                    held = self._held(members)
                    multiple = _PARTITION_ALIGNMENT * ranks
                    part = math.ceil(held / multiple) * _PARTITION_ALIGNMENT
                    found.append((held, _cut(members, ranks) if self.cut else part, ranks))
        return found

    def _optimizer_bytes(self, tensors: int) -> int:
        return sum(tensors * _FP32_BYTES * part for _, part, _ in self._partitions())

    def _whole_parameters(self) -> list[nn.Parameter]:
        """Those that ZeRO 3 leaves whole on every rank, besides cutting them: small ones, up to a total."""
        zero = self.settings["zero_optimization"]
        largest = zero["stage3_param_persistence_threshold"]
        room = zero.get("stage3_model_persistence_threshold", math.inf)
        found: list[nn.Parameter] = []
        for parameter in self.module.parameters():
            if parameter.numel() <= min(largest, room):
                found.append(parameter)
                room -= parameter.numel()
        return found

    def _gathered(self) -> int:
        """Elements that a step gathers from all ranks."""
        whole = {id(parameter) for parameter in self._whole_parameters()}
        return sum(p.numel() for p in self.module.parameters() if id(p) not in whole)

    def _weight_elements(self) -> int:
        if not self.cut:
            return self._held(self.module.parameters())
        parts = _cut(self.module.parameters(), self.mesh.dp_size)
        if self.mesh.dp_size == 1:  # nothing to gather: a parameter is its own part
            return parts
        return parts + sum(parameter.numel() for parameter in self._whole_parameters())

    def _gathered_elements(self) -> int:
        if not self.cut or self.mesh.dp_size == 1:
            return 0
        zero = self.settings["zero_optimization"]
        return min(self._gathered(), int(zero.get("stage3_max_live_parameters", _MAX_LIVE_PARAMETERS)))

    def _gradient_bytes(self) -> int:
        zero = self.config.zero
        held = sum(elements for elements, _, _ in self._partitions())
        if zero.stage == 1:
            return held * self.element
        fp32 = self.settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        parts = 0 if self.offloaded else sum(part for _, part, _ in self._partitions())
        bucket = min(zero.reduce_bucket_size, held) * self.element
        return parts * (_FP32_BYTES if fp32 else self.element) + bucket

    def _lane_stm_bytes(self) -> int:
        if not self.stage.uses_lanes:
            return 0
        model = self.config.model
        lanes = step_units(self.config, self.stage).total // self.mesh.dp_size
        return lanes * model.decoder.num_layers * model.stm_size * model.embed_dim * _FP32_BYTES

    def _communication(self) -> dict[str, int]:
        reductions = self.accumulation if self.config.zero.stage > 1 else 1
        reduced = {"auto": self.element, "fp32": _FP32_BYTES, "bf16": 2}[self.config.zero.reduce_dtype]
        groups = [(elements, ranks) for elements, _, ranks in self._partitions()]
        row = self.config.model.embed_dim * self.element
        return {
            "gradient_reduction": reductions
            * self._passes
            * sum(_sent(size * reduced, ranks) for size, ranks in groups),
            "parameter_all_gather": self._sent_weights()
            if self.cut
            else sum(_sent(size * self.element, ranks) for size, ranks in groups),
            "expert_all_to_all_per_layer_and_direction": int(self._travellers() * row),
            "expert_all_to_all": self._exchanged(),
            "tensor_parallel": self._tensor_bytes(),
        }

    def _travellers(self) -> float:
        """How often a step's tokens go to another rank in a layer (:mod:`rxt_dist.parallel.dispatch`)."""
        moe, ranks = self.config.model.decoder.moe, self.mesh.expert_size
        if moe is None or not _moes(self.module):
            return 0.0
        share = travelling(moe.num_experts, moe.top_k, ranks)
        return self.micro_tokens * self.accumulation / self.mesh.tensor_size * (ranks - 1) * share

    def _exchanged(self) -> int:
        """Bytes that a rank sends in a step so that tokens reach experts and come back, and their gradients,
        over all layers; recomputed ones go there and back once more."""
        moe = self.config.model.decoder.moe
        if moe is None:
            return 0
        layers = len(_moes(self.module))
        # Gradients do not go beyond the first layer that reads the memory if the decoder is frozen.
        ahead = 0 if self._keeps("decoder") else self.config.model.decoder.stateless_layers.count("moe")
        rows = 2 * self.config.model.embed_dim * self.element
        weights = moe.top_k * _FP32_BYTES  # numbers of experts, which have no gradient, are as many bytes
        forward = layers * (self.window + self.recomputed) * (rows + 2 * weights)
        backward = (layers - ahead) * self.window * (rows + weights)
        return int(self._travellers() * (forward + backward) / self.window)

    @property
    def _passes(self) -> int:
        """How often gradients go around the ring: a reduction, and the gathering of what nobody needs, where
        ZeRO 1 and 2 reduce a bucket for all ranks at once."""
        zero = self.settings["zero_optimization"]
        for_all = zero.get("use_multi_rank_bucket_allreduce", True) or not zero["reduce_scatter"]
        return 2 if for_all and not self.cut else 1

    def _tensor_bytes(self) -> int:
        """What the tensor group exchanges: rows of the model's width that are added up, and slices joined;
        and gradients of copies of which each rank sees a part."""
        summed, joined = tensor_rows(self.config, self.stage, self.micro_tokens, self.micro)
        if self.mesh.sequence_parallel:
            joined += divided_rows(self.config, self.stage, self.micro_tokens, self.micro)
        partial = sum(parameter.numel() for parameter in partial_parameters(self.module))
        # Adding up on a ring is a reduction and a gathering.
        elements = (2 * summed + joined) * self.config.model.embed_dim + 2 * partial
        return _sent(elements * self.element * self.accumulation, self.mesh.tensor_size)

    def _sent_weights(self) -> int:
        """Bytes that a rank sends in a step so that others have whole weights, with ZeRO 3."""
        kept = {id(parameter) for parameter in self._whole_parameters()}
        whole = sum(parameter.numel() for parameter in self._whole_parameters())
        zero = self.settings["zero_optimization"]
        reuse = zero.get("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE)
        ahead = zero.get("stage3_prefetch_bucket_size", _PREFETCH_BUCKET_SIZE)
        gathered = self._gathered()
        if gathered > max(reuse, ahead):  # dropped after every use
            writes = getattr(self.module, "memory_attention", None)
            parameters = [] if writes is None else writes.parameters()
            again = sum(p.numel() for p in parameters if id(p) not in kept)
            gathered = self._uses() * (gathered - again) + self._uses(each=True) * again
        return _sent((self.accumulation * gathered + whole) * self.element, self.mesh.dp_size)

    def _uses(self, *, each: bool = False) -> int:
        """How often a weight is used in a micro-batch, forward, backward and in recomputation; ``each``: by
        every position of a window, although those of the others are computed together."""
        if not self.stage.uses_lanes or not (each or self.recomputed):
            return 2
        return 2 * self.window + self.recomputed

    def _activation_elements(self) -> int:
        """See BASIS; a frozen component keeps nothing."""
        model, tokens, ranks = self.config.model, self.micro_tokens, self.mesh.tensor_size
        shares = _Shares(ranks, ranks if self.mesh.sequence_parallel else 1)
        elements = 0
        if self._keeps("encoder"):
            part = model.encoder
            layer = _attention(model, part.heads, part.attention, shares) + _feed_forward(
                model, part.ff_dim, part.gated_ff, shares
            )
            elements += tokens * part.num_layers * layer
        if self._keeps("decoder"):
            elements += tokens * _decoder_elements(model, shares)
        if self.stage.name == "context_sft":
            elements += self._read_elements(shares)
        elif self.stage.uses_lanes:
            elements += self._write_elements(shares)
        if self.recomputed:
            elements //= self.window
        return elements

    def _write_elements(self, shares: _Shares) -> int:
        """Of memory attention: of the slots, which are whole on every rank, and of what they read."""
        model = self.config.model
        part, layers = model.memory_attention, model.decoder.num_layers
        slots = self.micro * self.window * layers * model.stm_size
        heads = 3 * part.attention.kv_heads * (model.embed_dim // part.heads)
        read = layers * self.micro_tokens * (2 * model.embed_dim // shares.rows + heads // shares.inner)
        return slots * _attention(model, part.heads, part.attention, _Shares(shares.inner, 1)) + read

    def _read_elements(self, shares: _Shares) -> int:
        """Of the encodings that the positions of a window read, normed and projected once; each position then
        has the keys and values of all positions up to it."""
        part, width = self.config.model.decoder, self.config.model.embed_dim
        tokens = self.micro * self.config.model.seq_len * self.window
        keys_values = 2 * part.cross_attention.kv_heads * (width // part.heads) // shares.inner
        read = tokens * (self.window + 1) // 2
        return part.num_layers * (tokens * (2 * width // shares.rows + keys_values) + read * keys_values)

    def _keeps(self, component: str) -> bool:
        return _trains(self.stage, component)


def _trains(stage: StageConfig, component: str) -> bool:
    """Whether encoder or decoder has a backward pass in ``stage``."""
    if component in stage.frozen:
        return False
    if stage.uses_lanes:
        return stage.name in ANSWER_STAGES
    return uses(stage.components, component)


def _cut(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Elements of one rank's parts where every parameter is cut by itself."""
    return sum(math.ceil(parameter.numel() / ranks) for parameter in set(parameters))


def _sent(size: int, ranks: int) -> int:
    """Bytes that a rank sends when ``size`` bytes are reduced, gathered or exchanged over ``ranks``."""
    return size * (ranks - 1) // ranks


def _moes(module: nn.Module) -> list[MoE]:
    return [part for part in module.modules() if isinstance(part, MoE)]


class _Shares(NamedTuple):
    """Over how many ranks is divided what a layer keeps: ``inner``, heads and hidden channels of all rows;
    ``rows``, of inputs and norms."""

    inner: int
    rows: int


def _attention(model: ModelConfig, heads: int, config: AttentionConfig, shares: _Shares) -> int:
    """Elements an attention keeps of one token: its input, norm, projections (rotated) and heads' output."""
    width = model.embed_dim // heads
    inner = max(config.query_heads, config.kv_heads) * width
    projected = (2 * config.query_heads + 3 * config.kv_heads) * width
    return 2 * model.embed_dim // shares.rows + (projected + inner) // shares.inner


def _hidden(width: int, gated: bool) -> int:
    """Elements around the activation: gated, value and gate, activated gate and product."""
    return (4 if gated else 2) * width


def _feed_forward(model: ModelConfig, width: int, gated: bool, shares: _Shares) -> int:
    return 2 * model.embed_dim // shares.rows + _hidden(width, gated) // shares.inner


def _moe(model: ModelConfig, shares: _Shares) -> int:
    part, moe = model.decoder, model.decoder.moe
    assert moe is not None
    visited = moe.top_k * (3 * model.embed_dim + _hidden(part.ff_dim, part.gated_ff))
    shared = moe.num_shared_experts * _hidden(moe.shared_expert_dim or part.ff_dim, part.gated_ff)
    return (2 * model.embed_dim + moe.num_experts) // shares.rows + (visited + shared) // shares.inner


def _decoder_elements(model: ModelConfig, shares: _Shares) -> int:
    """Elements that all layers of the decoder keep of one token."""
    part = model.decoder
    own = _attention(model, part.heads, part.attention, shares)
    cross = _attention(model, part.heads, part.cross_attention, shares)
    dense = _feed_forward(model, part.dense_layer_dim, part.gated_ff, shares)
    moe = 0 if part.moe is None else _moe(model, shares)
    memory = moe or _feed_forward(model, part.ff_dim, part.gated_ff, shares)
    stateless = [*part.stateless_layers, *part.final_stateless_layers]
    extra = sum(own + (dense if kind == "dense" else moe) for kind in stateless)
    return part.num_layers * (own + cross + memory) + extra
