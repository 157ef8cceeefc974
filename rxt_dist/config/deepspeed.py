"""The DeepSpeed configuration made from ours, and which of its keys a run may override."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from rxt_dist.config.base import Problem, deep_merge
from rxt_dist.config.mesh import accumulation_steps, micro_units, step_units

if TYPE_CHECKING:
    from rxt_dist.config.run import RunConfig
    from rxt_dist.config.stage import OptimizerConfig, StageConfig

PERSISTENT_ELEMENTS = 100_000
"""Parameters up to this size stay whole on every rank with ZeRO 3: a message for each would cost more than
their memory."""

_OPEN_BLOCKS = (
    "bf16",
    "comms_logger",
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

_OPEN_ZERO_KEYS = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "enable_sanity_checks",
    "log_trace_cache_warnings",
    "reduce_scatter",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
"""Keys of ``zero_optimization`` that a run may set: they move bytes at other times or in other portions. What
changes where a parameter lies in the shards, or what a gradient is rounded to, must not be set."""

_FIXED_LOSS = "fixed, the loss is divided by the token counts of the whole step; remove it"

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
    "zero_optimization.offload_optimizer": "set zero.offload_optimizer instead",
    "tensor_parallel": "set parallel.tensor_size instead",
    "expert_parallel": "set parallel.expert_size instead",
    "prescale_gradients": _FIXED_LOSS,
    "gradient_predivide_factor": _FIXED_LOSS,
    "gradient_allreduce_op": _FIXED_LOSS,
    "managed_gradient_accumulation": _FIXED_LOSS,
    "zero_allow_untested_optimizer": "fixed; remove it",
    "zero_force_ds_cpu_optimizer": "fixed; remove it",
    "communication_data_type": "set zero.reduce_dtype instead",
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
            if key == "zero_optimization":
                problems += _zero_problems(value)
    return problems


def _zero_problems(overrides: Mapping[str, Any]) -> list[Problem]:
    """Keys of ``zero_optimization`` that are neither ours nor open."""
    problems = []
    for key in overrides:
        dotted = f"zero_optimization.{key}"
        if key not in _OPEN_ZERO_KEYS and dotted not in _OWNED_KEYS:
            close = get_close_matches(key, _OPEN_ZERO_KEYS, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(_OPEN_ZERO_KEYS)}"
            problems.append(Problem(dotted, f"cannot be set here; {hint}"))
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


def cut_override_problems(overrides: Mapping[str, Any]) -> list[Problem]:
    """What in a run's ``deepspeed`` block does not go with weights that are cut over ranks."""
    zero = overrides.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return []
    keys = [key for key in ("contiguous_gradients", "reduce_scatter") if key in zero]
    return [Problem(f"zero_optimization.{key}", "cannot be set with zero.stage 3; remove it") for key in keys]


def deepspeed_config(
    config: RunConfig, stage: StageConfig, *, dp_size: int, optimizer: OptimizerConfig, fused: bool = False
) -> dict[str, Any]:
    """The configuration handed to ``deepspeed.initialize`` for one stage.

    Args:
        config: the run; stage: the stage to train.
        dp_size: number of data-parallel ranks; must have passed ``check_world_size``.
        optimizer: the stage's settings, from ``stage_optimizer``.
        fused: whether AdamW runs as one kernel; for CUDA devices.

    With ZeRO 3 gradients are averaged over ranks, which the engine compensates for: DeepSpeed sums them
    only in the other stages.
    """
    zero = config.zero
    offloaded = zero.offload_optimizer == "cpu"
    accumulation = accumulation_steps(config, stage, dp_size)
    generated: dict[str, Any] = {
        "train_batch_size": step_units(config, stage).total,
        "train_micro_batch_size_per_gpu": micro_units(config, stage, dp_size),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_norm,
        # The loss is already divided by the counts of the whole step.
        "gradient_allreduce_op": "mean" if zero.stage == 3 else "sum",
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                # PyTorch's AdamW needs no compiler; DeepSpeed's own is built on first use.
                "torch_adam": True,
                # On the CPU the one kernel is vectorised, and exact.
                "fused": fused or offloaded,
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "overlap_comm": zero.overlap_comm,
            # ZeRO 3 copies gradients once more for it, into a buffer of a whole bucket.
            "contiguous_gradients": zero.stage < 3,
            "reduce_scatter": True,
        },
        "steps_per_print": float("inf"),
        "wall_clock_breakdown": False,
        # Its clock waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.precision == "bf16":
        # Non-finite gradients end a run where it logs or saves; DeepSpeed would look at every parameter
        # in every step, which costs a sixth of it.
        generated["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # With ZeRO 1, fp32 accumulation would select another optimizer class of DeepSpeed.
        if zero.stage > 1 and (accumulation > 1 or zero.reduce_dtype == "fp32"):
            generated["data_types"] = {"grad_accum_dtype": "fp32"}
    if zero.reduce_dtype != "auto":
        generated["communication_data_type"] = zero.reduce_dtype
    if offloaded:
        generated["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": fused}
    if zero.stage == 3:
        generated["zero_optimization"] |= {
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            # It would replace torch's linear layer for the rest of the process.
            "memory_efficient_linear": False,
        }
    return deep_merge(generated, config.deepspeed)
