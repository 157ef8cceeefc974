"""The DeepSpeed engine of one stage, and access to the optimizer state that each rank owns.

ZeRO gives every rank runs of the flattened parameters' fp32 masters and moments (see
:mod:`rxt_dist.train.shards`). All reading and writing of that state goes through
:meth:`StageEngine.owned_fragments`, which needs no communication.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from rxt_dist.checkpoint.fragments import Fragment, add_fragment, clip_fragment
from rxt_dist.model.canonical import canonical_parts
from rxt_dist.model.moe import MoE
from rxt_dist.parallel.bootstrap import configure_deepspeed
from rxt_dist.parallel.parallelize import first_holders, placement, tag_parameters
from rxt_dist.stages import StageModule
from rxt_dist.stages.expert_balance import ExpertBalance
from rxt_dist.train.flat_gradients import flatten_gradients
from rxt_dist.train.partitioned import (
    copy_weights,
    cut_weights,
    drop_weights,
    gather_at_once,
    reduce_each_gradient,
    weights_not_kept,
)
from rxt_dist.train.shards import owned_shards, part_of_rank

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNED_ELEMENTS = 8  # 16 bytes of bf16
_SETTLED = 3  # steps after which everything is compiled that a stage runs


class StageEngine:
    """Trains one stage module; owns the model's parameters until :meth:`close`.

    ``model`` holds fp32 weights on the CPU when it comes in. Its trainable parameters become the
    engine's; masters keep the full fp32 values also when the engine computes in bf16.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        module: StageModule,
        deepspeed_config: dict[str, Any],
        device: torch.device,
    ) -> None:
        # References to an engine before this one form a circle: its memory is given back only now.
        gc.collect()
        configure_deepspeed()
        import deepspeed
        from deepspeed.runtime.utils import is_model_parallel_parameter

        module.freeze()
        self._parts = canonical_parts(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = module.parameter_groups()
        for group in groups.values():
            # DeepSpeed lays the parameters of a group end to end; sizes that are no multiple of 16 bytes
            # come last, so that every other parameter stays aligned as the grouped product and vectorised
            # kernels need it.
            group.sort(key=lambda parameter: parameter.numel() % _ALIGNED_ELEMENTS != 0)
        trainable = [parameter for group in groups.values() for parameter in group]
        where = placement(model)
        experts = tag_parameters(model)
        self._steps = 0
        self._is_first, self._first_held = where.rank == 0, first_holders(model)
        # Tensor-parallel ranks have the same optimizer state of what is a copy on all of them.
        self._saves_copies = where.mesh.coordinates(where.rank).tp == 0
        self._copies = {
            names[id(parameter)] for parameter in trainable if not is_model_parallel_parameter(parameter)
        }
        self.group_starts = list(groups)
        """Step of the stage from which each group of parameters trains; at least one starts at 0."""
        self._names = {id(parameter): names[id(parameter)] for parameter in trainable}
        self._cuts_weights = deepspeed_config["zero_optimization"]["stage"] == 3
        masters = {id(parameter): self._kept(parameter.detach().view(-1)) for parameter in trainable}
        trained = set(self._names.values())
        # The engine casts what is registered with it; frozen weights keep their fp32 values here.
        self._frozen = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if name not in trained
        }
        self.module = module
        if self._cuts_weights:
            cut_weights(module, deepspeed_config, device)
            gather_at_once(module)
            module.zero_gradients = False  # its buckets hold what there is
        if experts & set(trainable):  # ZeRO refuses to be told of experts that it does not own
            _mark_experts(module, model)
        deepspeed.utils.groups.mpu = None  # an engine before this one may have had another mesh
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=_optimizer_groups(groups, experts),
            config=deepspeed_config,
            mpu=where.groups,
        )
        if self._cuts_weights:
            reduce_each_gradient(self.engine.optimizer)
        flatten_gradients(self.engine.optimizer)
        # Only now: placing the module on its device replaces buffers.
        self._buffers = dict(model.named_buffers())
        members = set(module.modules())
        layers = {name: part for name, part in model.named_modules() if part in members}
        self._balance = ExpertBalance({n: part for n, part in layers.items() if isinstance(part, MoE)})
        self._shards = owned_shards(self.engine.optimizer)
        for shard in self._shards:
            # Needed to load moments before the first step, in which DeepSpeed 0.19.8 would link the state of
            # all groups when only the first one has any.
            shard.create_moments()
            for piece in shard.pieces:
                begin, values = masters[id(piece.parameter)]
                piece.of(shard.flat).copy_(values[piece.start - begin :][: piece.count])

    def forward(
        self, batch: Any, counts: Mapping[str, int], stm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Loss, metric vector and carried STM of one micro-batch (see :meth:`StageModule.forward`)."""
        with weights_not_kept() if self._cuts_weights else nullcontext():
            loss, metrics, carried = self.engine(batch, counts, stm)
        return loss, metrics, carried

    def backward_and_step(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient; the last micro-batch of a step also updates the weights."""
        self.backward(loss)
        self.engine.step()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient: the sum over ranks and micro-batches of the gradients of their losses."""
        if self._cuts_weights:  # DeepSpeed takes the mean over ranks there
            loss = loss * torch.distributed.get_world_size()
        self.engine.backward(loss, scale_wrt_gas=False)

    def begin_step(self, step: int, rates: Mapping[int, float]) -> None:
        """Prepare optimizer step ``step`` of the stage; ``rates`` are learning rates by a group's start.

        A group that is still frozen has rate 0 and gradients of 0, so AdamW keeps its weights bit by bit.
        Its moments stay zero, but its step counter runs: at its start both begin anew, as those of a fresh
        optimizer (an old step counter would make the first updates too large).
        """
        self.module.step = step
        for shard in self._shards:
            start = shard.group["start"]
            shard.group["lr"] = rates[start]
            if step == start:
                for values in shard.state.values():
                    values.zero_()
        self._balance.begin_step()

    def end_step(self) -> None:
        """What follows an update: experts that train are balanced by the loads of the step. Collective."""
        if self.module.trains("decoder"):
            self._balance.end_step()
        self._steps += 1
        if self._steps == _SETTLED:
            # Collections look at all that was imported, built and compiled, if it is not left out: the host
            # stands still for a third of a second, and every other rank waits for it.
            gc.collect()
            gc.freeze()

    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def optimizer_steps(self) -> list[int]:
        """Step counter of the optimizer for the parameters of every start in ``group_starts``."""
        counters = {shard.group["start"]: int(shard.state["step"]) for shard in self._shards}
        return [counters[start] for start in self.group_starts]

    def owned_fragments(self) -> dict[str, Fragment]:
        """Everything that this rank owns of masters, moments and buffers, by checkpoint key.

        The values are views: writing into them changes the optimizer. What several ranks hold alike belongs
        to the first of them: frozen and unused weights, buffers, and the optimizer state of copies.
        """
        owned: dict[str, Fragment] = {}
        for name, start, kind, values in self._owned(_KEYS):
            if self._saves_copies or name not in self._copies:
                self._add(owned, _KEYS[kind], name, start, values)
        for name, values in self._frozen.items():
            if name in self._first_held:
                self._add(owned, "weight", name, 0, values.view(-1))
        if self._is_first:
            for name, buffer in self._buffers.items():
                self._add(owned, "weight", name, 0, buffer.view(-1))
            owned |= self._load_shares()
        return owned

    def resumed_fragments(self) -> dict[str, Fragment]:
        """What a run that is resumed inside the stage needs besides weights, by checkpoint key, as views: the
        moments that this rank holds, and on every rank the loads of the experts."""
        found: dict[str, Fragment] = {}
        for name, start, kind, values in self._owned(_MOMENTS):
            self._add(found, kind, name, start, values)
        return found | self._load_shares()

    def set_optimizer_steps(self, steps: Sequence[int]) -> None:
        """Set the step counters of bias correction, after the moments were loaded."""
        counters = dict(zip(self.group_starts, steps, strict=True))
        for shard in self._shards:
            shard.state["step"].fill_(counters[shard.group["start"]])

    def tensor_shapes(self) -> dict[str, list[int]]:
        """Shape of every canonical tensor of the model."""
        return {part.name: list(part.shape) for parts in self._parts.values() for part in parts}

    def _load_shares(self) -> dict[str, Fragment]:
        return {f"load_share.{name}": _whole(shares) for name, shares in self._balance.shares().items()}

    def close(self) -> None:
        """Release the engine's memory and hooks."""
        gc.unfreeze()
        self.engine.destroy()
        if self._cuts_weights:
            drop_weights(self.module)

    def whole_module(self, make_empty: Callable[[], StageModule]) -> StageModule:
        """A module with all weights of the engine's. Collective.

        That is the engine's own, except with ZeRO 3, where collective operations in its forward pass allow
        no rank another number of passes: there ``make_empty``, which gives the stage's module over a model
        without values, makes one that is filled.
        """
        if not self._cuts_weights:
            return self.module
        whole = make_empty()
        copy_weights(self.module, whole)
        return whole

    def _kept(self, values: torch.Tensor) -> tuple[int, torch.Tensor]:
        """First element and copy of what this rank may own of a parameter's flat values."""
        if not self._cuts_weights:
            return 0, values.clone()
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        start, count = part_of_rank(values.numel(), rank, ranks)
        return start, values[start : start + count].clone()

    def _add(self, found: dict[str, Fragment], key: str, name: str, start: int, values: torch.Tensor) -> None:
        """Add ``values``, the flat elements ``start ..`` of the parameter ``name``, to ``found``."""
        for part in self._parts[name]:
            fragment = clip_fragment(part, start, values)
            if fragment is not None:
                add_fragment(found, f"{key}.{part.name}", fragment)

    def _owned(self, kinds: Any) -> Iterator[tuple[str, int, str, torch.Tensor]]:
        """(parameter name, first element, kind, values) of every run of flat values that this rank owns."""
        for shard in self._shards:
            for piece in shard.pieces:
                for kind in kinds:
                    values = piece.of(shard.flat if kind == "master" else shard.state[kind])
                    yield self._names[id(piece.parameter)], piece.start, kind, values


def _whole(values: torch.Tensor) -> Fragment:
    return Fragment.run(values.numel(), 0, values.view(-1))


def _mark_experts(module: StageModule, model: torch.nn.Module) -> None:
    """Have DeepSpeed see that ``module`` has experts of ``model``."""
    from rxt_dist.parallel.deepspeed_experts import ExpertMark

    experts = next(part.config.num_experts for part in model.modules() if isinstance(part, MoE))
    module.add_module("expert_mark", ExpertMark(experts, placement(model).mesh.expert_size))


def _optimizer_groups(
    groups: Mapping[int, list[torch.nn.Parameter]], experts: set[torch.nn.Parameter]
) -> list[dict[str, Any]]:
    """The optimizer's groups: of each start, what all ranks share, and spread experts as DeepSpeed wants
    them (by the name of their process groups)."""
    found: list[dict[str, Any]] = []
    for start, members in groups.items():
        shared = [parameter for parameter in members if parameter not in experts]
        spread = [parameter for parameter in members if parameter in experts]
        if shared:
            found.append({"params": shared, "start": start})
        if spread:
            name = spread[0].group_name  # type: ignore[attr-defined]
            found.append({"params": spread, "start": start, "moe": True, "name": name})
    return found


_KEYS = {"master": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
