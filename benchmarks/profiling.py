"""Which kernels a step spends its time in, by PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TABLE_ROWS = 25
_NAME_WIDTH = 86


@dataclass(frozen=True)
class Kernel:
    """One kernel of the GPU, or one operator on a CPU, in a step."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes."""

    kernels: list[Kernel]
    """The longest first."""
    busy: float | None
    """Seconds of a step in which the GPU did something; None on a CPU."""
    messages: float = 0.0
    """Seconds of a step in which kernels of NCCL ran: they send to other ranks, or wait for them."""
    exposed: float = 0.0
    """Seconds of a step in which nothing else ran than kernels of NCCL."""


def profile_steps(
    step: Callable[[], object], count: int, device: torch.device, trace: Path | None = None
) -> Profile:
    """Means over ``count`` calls of ``step``; the host is slower than without a profiler, kernels are not.

    With ``trace`` all that ran is written there, for https://ui.perfetto.dev.
    """
    on_gpu = device.type == "cuda"
    # Without the host's operators, which would cost several times as much as the step.
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return gpu_profile(profiler.events(), count) if on_gpu else _cpu_profile(profiler.key_averages(), count)


def gpu_profile(events: Iterable[Any], count: int) -> Profile:
    """The profile of ``count`` steps from the profiler's events, whose times are microseconds."""
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    messages, others = [], []
    for event in events:
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        span = event.time_range.start / 1e6, event.time_range.end / 1e6
        (messages if event.name.startswith("nccl") else others).append(span)
        calls[event.name] += 1
        seconds[event.name] += span[1] - span[0]
    kernels = [Kernel(name, calls[name] / count, seconds[name] / count) for name in calls]
    busy, sending = union_seconds(messages + others), union_seconds(messages)
    exposed = busy - union_seconds(others)
    return Profile(_longest_first(kernels), busy / count, sending / count, exposed / count)


def _cpu_profile(averages: Iterable[Any], count: int) -> Profile:
    kernels = [Kernel(a.key, a.count / count, a.self_cpu_time_total / 1e6 / count) for a in averages]
    return Profile(_longest_first(kernels), None)


def _longest_first(kernels: list[Kernel]) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def union_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels of several streams may run at once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def table(found: Profile, step_seconds: float) -> str:
    """The longest kernels and their share of a step of ``step_seconds``."""
    lines = [f"{'ms/step':>9}{'share':>8}{'calls':>8}  {'kernel' if found.busy is not None else 'operator'}"]
    for kernel in found.kernels[:TABLE_ROWS]:
        name = kernel.name if len(kernel.name) <= _NAME_WIDTH else kernel.name[: _NAME_WIDTH - 3] + "..."
        share = kernel.seconds / step_seconds
        lines.append(f"{kernel.seconds * 1e3:>9.3f}{share:>8.1%}{kernel.calls:>8.1f}  {name}")
    kinds, calls = len(found.kernels), sum(kernel.calls for kernel in found.kernels)
    lines.append(f"{kinds} kinds, {calls:,.0f} calls a step")
    if found.busy is not None:
        lines.append(f"GPU busy {found.busy * 1e3:.2f} of {step_seconds * 1e3:.2f} ms a step"
                     f" ({found.busy / step_seconds:.1%})")  # fmt: skip
    if found.messages:
        lines.append(f"messages take {found.messages * 1e3:.2f} ms of it, {found.exposed * 1e3:.2f} ms"
                     f" of them while nothing else runs")  # fmt: skip
    return "\n".join(lines)
