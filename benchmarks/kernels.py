"""Error and speed of the hot operations of a step, each beside an eager fp32 reference.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --only attention --tokens 131072 --json kernels.json
    python benchmarks/kernels.py --compile
    python benchmarks/kernels.py --compile --plain

Sizes are those of RxT-Alpha with 65,536 tokens on a GPU, and tiny on a CPU. Errors are the largest
difference from the reference, as a share of its largest value: of the result, and of the worst gradient.
Times are medians. "floor" is the time in which the device could move what has to be read and written, or
compute the products, if that takes longer; by the data sheet's rates, or measured ones where the device is
not listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# As benchmarks/train_step.py: the packages are importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config

from benchmarks.devices import Rates, device_name, measured_rates, rated
from benchmarks.operations import SMALL, Case, Sizes, Tensors, operations
from rxt_dist.kernels import triton_support
from rxt_dist.kernels.compilation import set_compile


@dataclass(frozen=True)
class Row:
    """What was measured of one operation; times are seconds."""

    name: str
    error: float
    gradient_error: float
    forward: float
    forward_floor: float
    backward: float
    backward_floor: float
    eager_forward: float
    eager_backward: float

    def line(self) -> str:
        cells = [f"{self.error:>10.1e}{self.gradient_error:>10.1e}"]
        for seconds, floor in ((self.forward, self.forward_floor), (self.backward, self.backward_floor)):
            cells.append(f"{seconds * 1e3:>10.3f}{floor * 1e3:>10.3f}{floor / seconds:>8.0%}")
        cells.append(f"{self.eager_forward * 1e3:>10.3f}{self.eager_backward * 1e3:>10.3f}")
        return f"{self.name:<32}" + "".join(cells)


HEADER = (
    f"{'':<32}{'':>20}{'forward':>28}{'backward':>28}{'eager fp32':>20}\n{'operation':<32}{'error':>10}"
    f"{'of grads':>10}{'ms':>10}{'floor':>10}{'share':>8}{'ms':>10}{'floor':>10}{'share':>8}{'fwd ms':>10}"
    f"{'bwd ms':>10}"
)


def errors(case: Case, dtype: torch.dtype, ours: Callable[..., torch.Tensor]) -> tuple[float, float]:
    """Relative error of the result and of the worst gradient, of ``ours`` in ``dtype``.

    Both sides get the inputs as ``dtype`` rounds them; a result that is not finite has an infinite error.
    """
    half = [x.to(dtype).requires_grad_() for x in case.inputs]
    full = [x.detach().float().requires_grad_() for x in half]
    found, exact = ours(*half), case.exact(*full)
    factor = torch.randn_like(exact)
    (found.float() * factor).sum().backward()
    (exact * factor).sum().backward()
    gradients = [_difference(h.grad, f.grad) for h, f in zip(half, full, strict=True)]
    return _difference(found.detach(), exact.detach()), max(gradients)


def _difference(found: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    assert found.shape == exact.shape
    difference = float((found.float() - exact).abs().max() / exact.abs().max())
    return difference if torch.isfinite(found).all() else float("inf")


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median of ``repeats`` calls after two more, on the GPU's own clock where there is one."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    pairs = zip(events[::2], events[1::2], strict=True)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)


def time_both(
    function: Callable[..., torch.Tensor], inputs: Tensors, repeats: int, device: torch.device
) -> tuple[float, float, torch.Tensor]:
    """Seconds of the forward and of the backward pass, and the result."""
    forward = median_seconds(lambda: function(*inputs), repeats, device)
    out = function(*inputs)
    factor = torch.randn_like(out)
    backward = median_seconds(
        lambda: torch.autograd.grad(out, inputs, factor, retain_graph=True), repeats, device
    )
    return forward, backward, out.detach()


def floors(case: Case, inputs: Tensors, out: torch.Tensor, rates: Rates) -> tuple[float, float]:
    """The least seconds of the forward and of the backward pass."""
    read, written = sum(x.numel() for x in inputs), out.numel()
    # In the backward pass inputs and the result's gradient are read, the inputs' gradients written.
    forward, backward = case.moved or (read + written, 2 * read + written)
    seconds = out.element_size() / rates.memory
    constant = case.constant_bytes / rates.memory
    products = case.products / rates.matmul[inputs[0].dtype]
    later = 2 * case.products if case.backward_products is None else case.backward_products
    later_products = later / rates.matmul[inputs[0].dtype]
    return max(forward * seconds + constant, products), max(backward * seconds + constant, later_products)


def measure(
    name: str, case: Case, dtype: torch.dtype, rates: Rates, repeats: int, *, compiled: bool = False
) -> Row:
    """One row of the table."""
    device = case.inputs[0].device
    ours = case.ours
    if compiled:
        torch.compiler.reset()  # operations share code objects, of which only some versions are kept
        torch._functorch.config.donated_buffer = False  # the timed backward passes share one forward pass
        ours = torch.compile(case.ours, dynamic=False)
    error, gradient_error = errors(case, dtype, ours)
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs]
    forward, backward, out = time_both(ours, inputs, repeats, device)
    forward_floor, backward_floor = floors(case, inputs, out, rates)
    full = [x.detach().float().requires_grad_() for x in inputs]
    eager = time_both(case.exact, full, repeats, device)[:2]
    return Row(name, error, gradient_error, forward, forward_floor, backward, backward_floor, *eager)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="operations whose name contains TEXT")
    parser.add_argument("--tokens", type=int, help="tokens of a step (65,536 on a GPU, 192 on a CPU)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="(bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="measure what torch.compile makes of them")
    parser.add_argument(
        "--plain", action="store_true", help="use PyTorch's operators alone, no Triton kernels"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if arguments.tokens is not None and arguments.tokens < SMALL.tokens:
        parser.error(f"--tokens must be {SMALL.tokens} or more")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype or ("bf16" if on_gpu else "fp32")]
    sizes = Sizes() if on_gpu else SMALL
    if arguments.tokens:
        sizes = dataclasses.replace(sizes, tokens=arguments.tokens)
    if arguments.plain:
        triton_support.HAS_TRITON = False
    set_compile(arguments.compile)  # some backends of attention keep out of compiled code
    chosen = [item for item in operations(sizes, device, dtype) if arguments.only in item[0]]
    if not chosen:
        print(f"--only: found no operation with {arguments.only!r} in its name", file=sys.stderr)
        return 2
    rates = rated(device)
    source = "the data sheet" if rates else "a measurement"
    rates = rates or measured_rates(device)
    machine = f"{device_name(device)}; python {platform.python_version()}, torch {torch.__version__}"
    print(
        f"{machine}; {sizes.tokens} tokens, {dtype}, {'compiled' if arguments.compile else 'eager'}"
        f"{', without Triton kernels' if arguments.plain else ''}"
    )
    print(f"rates from {source}: {rates.matmul[dtype] / 1e12:.4g} TFLOP/s, {rates.memory / 1e9:.4g} GB/s\n")
    print(HEADER, flush=True)
    rows: list[dict[str, Any]] = []
    for name, make in chosen:
        torch.manual_seed(0)
        row = measure(name, make(), dtype, rates, arguments.repeats, compiled=arguments.compile)
        print(row.line(), flush=True)
        rows.append(asdict(row))
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    if arguments.json is not None:
        found = {"machine": machine, "sizes": asdict(sizes), "dtype": str(dtype), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
