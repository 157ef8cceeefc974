"""Prints, as JSON, the arguments that torch.compile believes each Triton kernel to write to, call by call.

A program of its own, as Triton must be imported for a GPU, not for its interpreter. The package's own
operations call the kernels, none of which runs.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from memory_samples import LAYERS, LENGTHS, SLOTS, WIDTH, memory_config, network
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from triton.backends.compiler import GPUTarget

from rxt_dist.kernels import cross_entropy_triton, random_triton, triton_support
from rxt_dist.kernels.activation import activate_rows
from rxt_dist.kernels.attention_triton import short_attention
from rxt_dist.kernels.combine import combine_rows
from rxt_dist.kernels.cross_entropy import linear_cross_entropy
from rxt_dist.kernels.noise import with_noise
from rxt_dist.kernels.norm import rms_norm_branch
from rxt_dist.kernels.permute import repeat_permuted
from rxt_dist.kernels.rotary_triton import rotate, rotated_heads
from rxt_dist.model import SequenceLayout
from rxt_dist.model.moe import ExpertOrder, Router
from rxt_dist.stages.write_losses import write_losses

found: dict[str, list[list[str]]] = {}


class Device:
    """Stands where Triton's driver would find a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def note_writes(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    named = dict(zip(kernel.arg_names, args, strict=False))
    named |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in named.items() if name not in tensors}
    table = kernel_side_table
    written = get_mutated_tensors(table.add_kernel(kernel), table.add_constant_args(constants), tensors, {})
    label = kernel.__module__.rsplit(".", 1)[1].removesuffix("_triton") + "." + kernel.__name__
    calls = found.setdefault(label, [])
    if sorted(written) not in calls:
        calls.append(sorted(written))


def call_everything() -> None:
    bf16 = torch.bfloat16
    tokens, copies, experts, width = 12, 3, 5, 64
    x = torch.randn(tokens, width, dtype=bf16, requires_grad=True)
    routing = Router(width, experts, copies).to(bf16)(x)
    ExpertOrder.of(torch.zeros(tokens, copies, dtype=torch.int64), experts)
    ExpertOrder.of_some(torch.zeros(tokens, copies, dtype=torch.int32), range(1, experts))
    slots = torch.arange(tokens * copies)
    expert_of_row, offsets = slots % experts, torch.arange(1, experts + 1, dtype=torch.int32)
    rows = repeat_permuted(x, slots, slots, copies)
    b_in = torch.randn(experts, 2 * width, dtype=bf16, requires_grad=True)
    b_out = torch.randn(experts, width, dtype=bf16, requires_grad=True)
    rows = activate_rows(torch.cat([rows, rows], dim=1), b_in, offsets, expert_of_row, "silu", True)
    out = combine_rows(rows, b_out, routing.weights, slots, slots, offsets, expert_of_row)
    heads = torch.cat([out, out, out], dim=1).view(tokens, 12, 16)
    angles = torch.randn(tokens, 1, 8)
    q, k, v = rotated_heads(heads, angles, angles, 4, 4)
    q = rotate(q, angles, angles, halves=False)
    ends = torch.tensor([0, 5, tokens], dtype=torch.int32)
    mixed = short_attention(q, k, v, ends, ends, causal=True, scale=0.25).flatten(1)
    weight = torch.randn(100, width, dtype=bf16, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    loss, _ = linear_cross_entropy(mixed, weight, None, targets, tokens)
    (loss + routing.chosen_mass.sum()).backward()
    scores = torch.randn(tokens, 100, dtype=bf16)
    numbers = torch.empty(4, tokens)
    cross_entropy_triton.score_parts(scores, targets, 0, numbers)
    cross_entropy_triton.put_gradient_of_part(scores, targets, 0, torch.ones(tokens))
    call_memory_losses(x.detach())
    stream, normed = rms_norm_branch(x, torch.ones(width, dtype=bf16, requires_grad=True))
    (stream.sum() + normed.sum()).backward()
    gate = {"type": "linear", "activation": "sigmoid", "slot_status": "mean"}
    write = network(memory_config("self_interlayer", gate=gate))
    stm, encoded = torch.randn(LAYERS, len(LENGTHS), SLOTS, WIDTH), torch.randn(LAYERS, sum(LENGTHS), WIDTH)
    write(stm, encoded, SequenceLayout.from_lengths(LENGTHS)).sum().backward()


def call_memory_losses(x: torch.Tensor) -> None:
    """``x``: [N, D]."""
    tokens, width = x.shape
    stm = torch.randn(2, 3, 4, width, requires_grad=True)
    lanes, factors = torch.arange(3), torch.ones(3)
    layers, keys = torch.stack([x, x]), torch.arange(2 * tokens).view(2, tokens)
    random_triton.with_draws(stm.detach(), lanes > 0, lanes, random_triton.NORMAL, 1.0)
    layout = SequenceLayout.from_lengths([4, 4, tokens - 8])
    losses = write_losses(
        stm * 2, stm, with_noise(layers, keys, 0.5), factors, factors, layout, lanes > 0, keys, 0.5
    )
    sum(losses).backward()


if __name__ == "__main__":
    triton.runtime.driver.set_active(Device())
    triton.runtime.JITFunction.run = note_writes
    triton_support.interpreted = True
    call_everything()
    print(json.dumps(found))
