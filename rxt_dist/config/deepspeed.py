"""The DeepSpeed configuration made from ours, and which of its keys a run may override."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from rxt_dist.config.base import Problem, deep_merge
from rxt_dist.config.mesh import accumulation_steps, micro_units, step_units

if TYPE_CHECKING:
    from rxt_dist.config.run import OptimizerConfig, RunConfig, StageConfig

_OPEN_BLOCKS = (
    "bf16",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)
"""Top-level DeepSpeed keys that a run may set. DeepSpeed ignores unknown ones, so a typo must end here."""

_FIXED_LOSS = "fixed, the loss is divided by the token counts of the whole step; remove it"
_NOT_SUPPORTED = "not supported; remove it"

_OWNED_KEYS = {
    "train_batch_size": "set batch.packs instead",
    "train_micro_batch_size_per_gpu": "set batch.micro_packs instead",
    "gradient_accumulation_steps": "set batch.micro_packs instead",
    "gradient_clipping": "set optimizer.clip_norm instead",
    "optimizer": "set optimizer instead",
    "scheduler": "set optimizer.schedule instead",
    "fp16": "set precision instead (fp32 or bf16)",
    "torch_autocast": "set precision instead (fp32 or bf16)",
    "bf16.enabled": "set precision instead",
    "data_types": "set precision instead",
    "zero_optimization.stage": "set zero.stage instead",
    "zero_optimization.reduce_bucket_size": "set zero.reduce_bucket_size instead",
    "zero_optimization.overlap_comm": "set zero.overlap_comm instead",
    "zero_optimization.offload_optimizer": _NOT_SUPPORTED,
    "zero_optimization.offload_param": _NOT_SUPPORTED,
    "zero_optimization.zenflow": _NOT_SUPPORTED,
    "tensor_parallel": "set parallel.tensor_size instead",
    "expert_parallel": "set parallel.expert_size instead",
    "prescale_gradients": _FIXED_LOSS,
    "gradient_predivide_factor": _FIXED_LOSS,
    "gradient_allreduce_op": _FIXED_LOSS,
    "managed_gradient_accumulation": _FIXED_LOSS,
    "zero_allow_untested_optimizer": "fixed; remove it",
}
"""DeepSpeed keys (dotted) that our own fields decide, and what to do instead of overriding them."""


def override_problems(overrides: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a run's ``deepspeed`` block; fields are relative to the block."""
    problems = []
    for key, value in overrides.items():
        if key in _OWNED_KEYS:
            problems.append(Problem(key, f"cannot be set here; {_OWNED_KEYS[key]}"))
        elif key not in _OPEN_BLOCKS:
            close = get_close_matches(key, [*_OPEN_BLOCKS, *_OWNED_KEYS], n=1)
            hint = f"did you mean deepspeed.{close[0]}?" if close else f"valid: {', '.join(_OPEN_BLOCKS)}"
            problems.append(Problem(key, f"not a DeepSpeed key that can be set here; {hint}"))
        elif key in ("bf16", "zero_optimization") and not isinstance(value, Mapping):
            problems.append(Problem(key, f"found {json.dumps(value)}; must be a mapping"))
        elif isinstance(value, Mapping):
            owned = [f"{key}.{inner}" for inner in value if f"{key}.{inner}" in _OWNED_KEYS]
            problems += [Problem(dotted, f"cannot be set here; {_OWNED_KEYS[dotted]}") for dotted in owned]
    return problems


def expert_override_problems(overrides: Mapping[str, Any], field: str) -> list[Problem]:
    """What in a run's ``deepspeed`` block does not go with experts that have groups of their own, as with
    ``field`` of ``parallel`` above 1."""
    zero = overrides.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return []
    return [
        Problem(f"zero_optimization.{key}", f"found false; parallel.{field} above 1 needs it, valid: true")
        for key in ("contiguous_gradients", "reduce_scatter")
        if zero.get(key) is False
    ]


def deepspeed_config(
    config: RunConfig, stage: StageConfig, *, dp_size: int, optimizer: OptimizerConfig, fused: bool = False
) -> dict[str, Any]:
    """The configuration handed to ``deepspeed.initialize`` for one stage.

    Args:
        config: the run; stage: the stage to train.
        dp_size: number of data-parallel ranks; must have passed ``check_world_size``.
        optimizer: the stage's settings, from ``stage_optimizer``.
        fused: whether AdamW runs as one kernel; for CUDA devices.
    """
    accumulation = accumulation_steps(config, stage, dp_size)
    generated: dict[str, Any] = {
        "train_batch_size": step_units(config, stage).total,
        "train_micro_batch_size_per_gpu": micro_units(config, stage, dp_size),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_norm,
        # The loss is already divided by the counts of the whole step.
        "gradient_allreduce_op": "sum",
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                # PyTorch's AdamW needs no compiler; DeepSpeed's own is built on first use.
                "torch_adam": True,
                "fused": fused,
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": config.zero.reduce_bucket_size,
            "overlap_comm": config.zero.overlap_comm,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
        "steps_per_print": float("inf"),
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        # Non-finite gradients end a run where it logs or saves; DeepSpeed would look at every parameter
        # in every step, which costs a sixth of it.
        generated["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # With ZeRO 1, fp32 accumulation would select another optimizer class of DeepSpeed.
        if accumulation > 1 and config.zero.stage == 2:
            generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return deep_merge(generated, config.deepspeed)
