"""ZeRO 1 with the gradients of a group in one flat tensor, in place of DeepSpeed's work on each of them.

DeepSpeed 0.19.8 copies the gradient of every parameter twice, into a bucket and out of it, takes its norm,
and binds every parameter anew after an update; where it reduces and where it clips, the host waits for the
device. With some hundred parameters the host is then slower than a GPU. Here a few operations treat all
parameters of a group at once, and nothing waits.

Where the optimizer is on the host, a partition of the gradients goes there in one copy, for which an update
waits.

What is computed is the same: gradients of micro-batches are added up in the dtype of the weights, then over
the ranks in the one of ``zero.reduce_dtype``. DeepSpeed's optimizer keeps its state and its update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

KNOWN_VERSION = "0.19.8"
"""Of DeepSpeed, whose methods are replaced; another version works as it comes."""
_ROW = 1024


@dataclass(eq=False)
class _Group:
    """Parameters whose optimizer state is sharded over ``ranks``.

    Attributes:
        size: elements of all gradients with padding; dtype: in which they are summed over the ranks.
        partition: the run of them that this rank updates.
        counted: runs of the partition, relative to it, that this rank adds to the norm; None: all of it.
        flat: all gradients, from the first of a step to its update; messages: sums that are under way.
    """

    ranks: Any
    size: int
    dtype: torch.dtype
    partition: slice
    counted: list[slice] | None
    flat: torch.Tensor | None = None
    messages: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Bucket:
    """Parameters that lie end to end in a group and are summed in one message.

    Attributes:
        start, stop: their run of the group, with the padding behind the last one.
        missing: how many gradients the backward pass still owes.
    """

    group: _Group
    parameters: list[torch.nn.Parameter]
    start: int
    stop: int
    missing: int = 0


def flatten_gradients(zero: Any) -> bool:
    """Replace the work on single gradients of DeepSpeed's ZeRO optimizer, before its first step.

    Returns whether that was possible; else ``zero`` works as before: with ZeRO 2 and 3, gradients that are
    averaged or go to one rank alone, or another version of DeepSpeed.
    """
    from deepspeed import __version__
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(zero, DeepSpeedZeroOptimizer) or zero.partition_gradients:
        return False
    to_one_rank = zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce
    if zero.gradient_average or to_one_rank:
        return False
    if __version__ != KNOWN_VERSION:
        logger.warning("DeepSpeed %s: steps are slower than with %s", __version__, KNOWN_VERSION)
        return False
    _FlatGradients(zero)
    return True


class _FlatGradients:
    """What the replaced methods of ``zero`` do."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._groups = [self._describe(number) for number in range(len(zero.bit16_groups))]
        # The later a parameter is used, the earlier comes its gradient. Ranks must send in the same order.
        buckets = [bucket for number in range(len(self._groups)) for bucket in self._buckets_of(number)][::-1]
        self._buckets = sorted(buckets, key=lambda bucket: dist.get_world_size(bucket.group.ranks) == 1)
        self._reduced = 0
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks = self._hooks() if zero.overlap_comm else []
        zero.reduce_gradients = self.reduce
        zero.scaled_global_norm = self.norm
        zero.unscale_and_clip_grads = self.clip
        # They are views of the flat weights from the beginning.
        zero._update_model_bit16_weights = lambda group_index: None

    def reduce(self, pipeline_parallel: bool = False) -> None:
        """Sum the gradients over the ranks; the update finds those of this rank's partition."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        self._send(len(self._buckets))
        self._reduced = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        for number, group in enumerate(self._groups):
            for message in group.messages:
                message.wait()
            assert group.flat is not None
            partition = group.flat[group.partition]
            group.flat, group.messages = None, []
            if self._zero.cpu_offload:
                on_host = self._zero.single_partition_of_fp32_groups[number].grad
                on_host.copy_(partition, non_blocking=True)
                self._zero._record_offload_copy()  # for which an update waits
            self._zero.averaged_gradients[number] = GradPartitionBufferGroup([partition], partition)

    def norm(self, norm_type: int = 2) -> torch.Tensor:
        """Euclidean norm of all gradients of all ranks: fp32 scalar on the optimizer's device, not finite if
        one of them is not."""
        zero = self._zero
        total = torch.zeros((), device=zero.bit16_groups_flat[0].device)
        for number, group in enumerate(self._groups):
            partition = zero.averaged_gradients[number].flat_partition
            if group.counted is None:
                total = total + _sum_of_squares(partition)
            elif group.counted:
                norms = torch._foreach_norm([partition[run] for run in group.counted], 2, torch.float32)
                total = total + torch.stack(norms).square().sum()
        divided = [] if zero.model_parallel_group is None else [zero.model_parallel_group]
        for ranks in (zero.dp_process_group, *divided):
            if dist.get_world_size(ranks) > 1:
                dist.all_reduce(total, group=ranks)
        return total.sqrt().to(zero.device)

    def clip(self, gradients: list[torch.Tensor], total_norm: torch.Tensor) -> None:
        """Scale ``gradients`` down to the clipping norm, if ``total_norm`` is above it.

        Optimizers that can divide by a number in their own pass, as PyTorch's fused ones can, are told to.
        """
        if self._zero.clip_grad <= 0.0:
            return
        excess = torch.clamp((total_norm + 1e-6) / self._zero.clip_grad, min=1.0)
        if getattr(self._zero.optimizer, "_step_supports_amp_scaling", False):
            self._zero.optimizer.grad_scale = excess
            return
        for gradient in gradients:
            gradient.mul_(1.0 / excess)

    def _describe(self, number: int) -> _Group:
        zero = self._zero
        ranks = zero.real_dp_process_group[number]
        size = int(zero.partition_size[number])
        first = dist.get_rank(ranks) * size
        alone = dist.get_world_size(ranks) == 1
        return _Group(
            ranks=ranks,
            size=zero.bit16_groups_flat[number].numel(),
            # Where nothing is sent, gradients go at once to what the update reads.
            dtype=torch.float32 if alone else zero.communication_data_type,
            partition=slice(first, first + size),
            # Tensor-parallel ranks have copies of some parameters, which count once.
            counted=None if zero.model_parallel_rank == 0 else self._divided(number, first, size),
        )

    def _divided(self, number: int, first: int, size: int) -> list[slice]:
        """Runs of the partition that belong to parameters which tensor-parallel ranks divide."""
        from deepspeed.runtime.utils import is_model_parallel_parameter

        found, place = [], -first
        for parameter in self._zero.round_robin_bit16_groups[number]:
            start, place = place, place + parameter.numel()
            run = slice(max(start, 0), min(place, size))
            if is_model_parallel_parameter(parameter) and run.start < run.stop:
                found.append(run)
        return found

    def _buckets_of(self, number: int) -> list[_Bucket]:
        """Buckets that cover a group, in its order; one holds more than the limit if a parameter does."""
        group, stop = self._groups[number], 0
        buckets: list[_Bucket] = []
        for parameter in self._zero.round_robin_bit16_groups[number]:
            start, stop = stop, stop + parameter.numel()
            if not buckets or stop - buckets[-1].start > self._zero.reduce_bucket_size:
                buckets.append(_Bucket(group, [], start, start))
            buckets[-1].parameters.append(parameter)
            buckets[-1].stop = stop
            buckets[-1].missing += 1
        buckets[-1].stop = group.size
        return buckets

    def _hooks(self) -> list[Any]:
        """Send a bucket as soon as it is complete, while the backward pass still runs."""
        return [
            parameter.register_post_accumulate_grad_hook(self._arrival(bucket))  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            if dist.get_world_size(bucket.group.ranks) > 1
            for parameter in bucket.parameters
        ]

    def _arrival(self, bucket: _Bucket) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            if self._zero.is_gradient_accumulation_boundary():
                bucket.missing -= 1
                if bucket.missing == 0:
                    complete = self._reduced
                    while complete < len(self._buckets) and self._buckets[complete].missing == 0:
                        complete += 1
                    self._send(complete)

        return arrived

    @torch.no_grad()
    def _send(self, until: int) -> None:
        """Collect the gradients of the buckets before number ``until``, and begin to sum them over ranks."""
        for bucket in self._buckets[self._reduced : until]:
            group, parameters = bucket.group, bucket.parameters
            device = parameters[0].device
            if group.flat is None:
                group.flat = torch.empty(group.size, dtype=group.dtype, device=device)
            run = group.flat[bucket.start : bucket.stop]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            places = torch._utils._unflatten_dense_tensors(run, parameters)  # type: ignore[no-untyped-call]
            torch._foreach_copy_(places, gradients)
            run[sum(parameter.numel() for parameter in parameters) :].zero_()
            for parameter in parameters:
                parameter.grad = None
            if dist.get_world_size(group.ranks) > 1:
                group.messages.append(dist.all_reduce(run, group=group.ranks, async_op=True))
        self._reduced = max(self._reduced, until)


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """fp32 scalar of flat ``values``, by rows: on a CPU one sum over millions of them is inexact."""
    rows = values.numel() // _ROW
    whole, rest = values[: rows * _ROW].view(rows, _ROW), values[rows * _ROW :]
    norms = torch.linalg.vector_norm(whole, dim=1, dtype=torch.float32)
    total: torch.Tensor = norms.square().sum() + torch.linalg.vector_norm(rest, dtype=torch.float32).square()
    return total
