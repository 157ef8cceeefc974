"""Tables of what :mod:`benchmarks.meshes` has measured."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import train_step

MIB, MB = 1 << 20, 1e6
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "reduce", "broadcast")
SENT_FOR = {
    "gradient_reduction": "gradients",
    "parameter_all_gather": "weights",
    "expert_all_to_all": "experts",
    "tensor_parallel": "tensors",
}
"""What bytes are sent for, by the names of `rxt plan`."""

ROUNDING = {"fp32": 1e-5, "bf16": 2**-8}
"""Relative differences of losses that are rounding in any case: in bf16 that of a number, in fp32 what the
tests of parity allow."""
_TIMES_CONTROL = 3
_SHOWN_LOSSES = 5

Found = Mapping[str, dict[str, Any]]


def describe(setting: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Machine, versions, model and batch, without what differs from mesh to mesh."""
    head, model, *rest = train_step.describe(setting).splitlines()
    head = head.replace(f"ranks: {setting['ranks']}", f"ranks: up to {arguments.ranks}")
    return "\n".join([head, model.replace(f", ZeRO {setting['zero']['stage']}", ""), *rest[:-1]])


def tables(found: Found) -> str:
    """Speed and memory, bytes by kind of operation, and bytes by purpose beside the plan."""
    width = max(len("mesh"), *(len(name) for name in found)) + 1
    first = next(iter(found.values()))
    speed = [_row("mesh", width, ["ZeRO", "compiled", "tokens/s", "of first", "step, ms", "MiB", "planned"])]
    kinds = [kind for kind in KINDS if any(one["sent_bytes"].get(kind) for one in found.values())]
    sent = [_row("sent, MB", width, [*kinds, "calls"], 15)]
    purposes = [_row("", width, [f"{name}: sent, plan" for name in SENT_FOR.values()], 22)]
    for name, one in found.items():
        cells = [str(one["zero_stage"]), "yes" if one["compiled"] else "no"]
        cells += [f"{one['tokens_per_second']:,.0f}"]
        cells += [f"{one['tokens_per_second'] / first['tokens_per_second']:.2f}"]
        cells += [f"{one['step_seconds'] * 1e3:.2f}"]
        cells += [f"{one[size] / MIB:,.0f}" for size in ("peak_bytes", "planned_bytes")]
        speed.append(_row(name, width, cells))
        amounts = [f"{one['sent_bytes'].get(kind, 0) / MB:,.3f}" for kind in kinds]
        sent.append(_row(name, width, [*amounts, f"{sum(one['calls'].values()):,.0f}"], 15))
        pairs = [
            f"{one['sent_bytes_for'][key] / MB:,.3f} {one['planned_bytes_for'][key] / MB:>10,.3f}"
            for key in SENT_FOR
        ]
        purposes.append(_row(name, width, pairs, 22))
    return "\n\n".join("\n".join(lines) for lines in (speed, sent, purposes))


def _row(name: str, width: int, cells: Sequence[str], cell_width: int = 11) -> str:
    return f"{name:<{width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells)


def differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Relative, of every step."""
    return [abs(own - other) / abs(other) for own, other in zip(losses, reference, strict=True)]


@dataclass(frozen=True)
class Curves:
    """Losses of every mesh on the same batches, and by how much they may differ."""

    found: Found
    rounding: float

    @property
    def first(self) -> str:
        return next(iter(self.found))

    @property
    def reference(self) -> list[float]:
        losses: list[float] = self.found[self.first]["curve"]
        return losses

    @property
    def control(self) -> list[float] | None:
        """Losses of the first mesh with other micro-batches."""
        return self.found[self.first]["control"]

    @property
    def bound(self) -> float:
        """Of the mean over the steps: single steps differ by chance much more than others."""
        control = [0.0] if self.control is None else differences(self.control, self.reference)
        return max(self.rounding, _TIMES_CONTROL * statistics.fmean(control))

    def agree(self) -> bool:
        """Whether no mesh differs from the first by more than the bound."""
        curves = [one["curve"] for one in self.found.values()]
        return all(statistics.fmean(differences(curve, self.reference)) <= self.bound for curve in curves)

    def text(self) -> str:
        """Some losses of every mesh, and how far they are from those of the first."""
        curves = {name: one["curve"] for name, one in self.found.items()}
        if self.control is not None:
            curves["sums regrouped"] = self.control
        count = len(self.reference)
        steps = sorted(
            {1, *(math.ceil(count * part / _SHOWN_LOSSES) for part in range(1, _SHOWN_LOSSES + 1))}
        )
        width = max(len("loss at step"), *(len(name) for name in curves)) + 1
        lines = [
            _row("loss at step", width, [*map(str, steps)]) + f"  from {self.first}, relative: mean, most"
        ]
        for name, losses in curves.items():
            far = differences(losses, self.reference)
            row = _row(name, width, [f"{losses[at - 1]:.5f}" for at in steps])
            most = f"{statistics.fmean(far):.1e}, {max(far):.1e} (step {far.index(max(far)) + 1})"
            lines.append(row if name == self.first else f"{row}  {most}")
        return "\n".join([*lines, f"valid: a mean of at most {self.bound:.1e}"])
