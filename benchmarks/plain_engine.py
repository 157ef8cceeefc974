"""A stage trained by PyTorch alone: what a step costs without DeepSpeed, on the same module and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from rxt_dist.config import RunConfig, StageConfig, stage_optimizer
from rxt_dist.config.mesh import accumulation_steps
from rxt_dist.errors import ConfigError
from rxt_dist.parallel.bootstrap import World
from rxt_dist.stages import StageModule


def check_plain(config: RunConfig) -> None:
    """Raise :class:`ConfigError` for a run that needs DeepSpeed."""
    for field, size in config.parallel.model_dump().items():
        if size > 1:
            raise ConfigError(f"--without-deepspeed: found parallel.{field} {size}; valid: 1")


class PlainEngine:
    """Weights in the run's precision, fp32 masters, AdamW (fused on CUDA), clipping by the global norm.

    Offers what :class:`~rxt_dist.train.engine.StageEngine` offers a training loop. Gradients are added up in
    the dtype of the weights, and over ranks in one message; the optimizer state is whole on every rank.
    Neither experts nor tensors may be spread over ranks (:func:`check_plain`).
    """

    def __init__(self, config: RunConfig, stage: StageConfig, world: World, module: StageModule) -> None:
        module.freeze()
        self.module = module
        groups = module.parameter_groups()
        self.group_starts = list(groups)
        self._weights = [parameter for group in groups.values() for parameter in group]
        self._half = config.precision == "bf16"
        masters = {p: p.detach().clone() if self._half else p for p in self._weights}
        self._masters = list(masters.values())
        if self._half:
            module.bfloat16()
        settings = stage_optimizer(config, stage)
        self._clip_norm = settings.clip_norm
        self._optimizer = torch.optim.AdamW(
            [{"params": [masters[p] for p in group], "start": start} for start, group in groups.items()],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=world.device.type == "cuda",
        )
        self._ranks = world.size
        self._accumulation = accumulation_steps(config, stage, world.size)
        self._micro_batches = 0

    def begin_step(self, step: int, rates: Mapping[int, float]) -> None:
        """Set the learning rates by a group's start; a group's moments begin anew where it starts."""
        self.module.step = step
        for group in self._optimizer.param_groups:
            group["lr"] = rates[group["start"]]
            if step == group["start"]:
                for master in group["params"]:
                    self._optimizer.state.pop(master, None)

    def end_step(self) -> None:
        """Nothing: experts are not balanced here."""

    def forward(
        self, batch: Any, counts: Mapping[str, int], stm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See :meth:`StageModule.forward`."""
        loss, metrics, carried = self.module(batch, counts, stm)
        return loss, metrics, carried

    def backward_and_step(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient; the last micro-batch of a step also updates the weights."""
        self.backward(loss)
        self._micro_batches += 1
        if self._micro_batches % self._accumulation == 0:
            self._update()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Release the gradients and the optimizer state."""
        self._optimizer.zero_grad()
        self._optimizer.state.clear()

    @torch.no_grad()
    def _update(self) -> None:
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        assert len(gradients) == len(self._weights)
        if self._ranks > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])
        if self._half:
            for master in self._masters:
                if master.grad is None:
                    master.grad = torch.empty_like(master)
            torch._foreach_copy_([master.grad for master in self._masters], gradients)
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._masters, self._clip_norm, foreach=True)
        self._optimizer.step()
        if self._half:
            torch._foreach_copy_(self._weights, self._masters)
        for weight in self._weights:
            weight.grad = None
