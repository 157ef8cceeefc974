"""The table of hot operations, and each of them against its eager fp32 reference."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.devices import Rates
from benchmarks.kernels import errors, floors, measure
from benchmarks.operations import SMALL, Case, Sizes, operations
from rxt_dist.kernels.attention import set_attention_backend

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# Of a GPU also with rows that fill no tile, and with the widths of heads that models have.
GPU_SIZES = Sizes(
    tokens=3000, seq_len=200, slots=72, hidden=104, expert_hidden=88, vocabulary=1003, chunks=(1000,)
)
NAMES = [name for name, _ in operations(SMALL, CPU, torch.float32)]
GPU_NAMES = [
    name
    for name, _ in operations(GPU_SIZES, torch.device("cuda"), torch.bfloat16)
    if torch.cuda.is_available() or not name.startswith("attention")
]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 0.02}
"""Largest errors, relative to the largest value: roundings of inputs and results, not of sums."""


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    set_attention_backend("sdpa", CPU, torch.float32)


def case_of(
    name: str, sizes: Sizes = SMALL, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Case:
    return dict(operations(sizes, device, dtype))[name]()


def test_what_is_compared() -> None:
    heads = [f"attention {kind} sdpa d={d}" for d in (16, 32) for kind in ("self", "causal", "cross")]
    experts = ("repeat", "swiglu of experts", "combine", "grouped_linear", "router", "route and permute")
    norms = ("rms_norm", "rms_norm and residual")
    others = (*norms, "rope", "swiglu", *experts, "linear_cross_entropy C=64")
    assert [*heads, *others, "embedding"] == NAMES


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype=dtype)
    assert max(errors(case, dtype, case.ours)) < LIMITS[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_result_is_seen(name: str) -> None:
    case = case_of(name)
    error, gradient_error = errors(case, torch.float32, lambda *inputs: case.ours(*inputs) * 1.01)
    assert error == pytest.approx(0.01, rel=1e-3)
    assert gradient_error == pytest.approx(0.01, rel=1e-3)
    assert errors(case, torch.float32, lambda *inputs: case.ours(*inputs) / 0.0)[0] == float("inf")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GPU_NAMES)
def test_results_and_gradients_on_a_gpu(name: str) -> None:
    case = case_of(name, GPU_SIZES, torch.device("cuda"), torch.bfloat16)
    assert max(errors(case, torch.bfloat16, case.ours)) < LIMITS[torch.bfloat16]


def test_floors() -> None:
    rates = Rates({torch.bfloat16: 1e6}, memory=1e3)
    inputs = [torch.zeros(10, 4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)]
    out = torch.zeros(10, dtype=torch.bfloat16)
    case = Case(inputs, torch.mv, torch.mv)
    assert floors(case, inputs, out, rates) == pytest.approx((0.108, 0.196))
    bound = dataclasses.replace(case, products=400_000, constant_bytes=100)
    assert floors(bound, inputs, out, rates) == pytest.approx((0.4, 0.8))
    early = dataclasses.replace(bound, backward_products=300_000)
    assert floors(early, inputs, out, rates) == pytest.approx((0.4, 0.3))
    moved = dataclasses.replace(case, moved=(5, 8), constant_bytes=100)
    assert floors(moved, inputs, out, rates) == pytest.approx((0.11, 0.116))


@pytest.mark.slow
def test_a_compiled_operation_is_the_same() -> None:
    rates = Rates({torch.float32: 1e12}, memory=1e10)
    row = measure(
        "route and permute", case_of("route and permute"), torch.float32, rates, repeats=1, compiled=True
    )
    assert max(row.error, row.gradient_error) < LIMITS[torch.float32]


def kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/kernels.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def test_the_table(tmp_path: Path) -> None:
    result = kernels("--repeats", "2", "--json", str(tmp_path / "found.json"))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["rows"]] == NAMES
    lines = result.stdout.splitlines()[-len(NAMES) :]
    for line, row in zip(lines, found["rows"], strict=True):
        assert line.startswith(row["name"])
        times = [row[name] for name in ("forward", "forward_floor", "backward", "backward_floor")]
        assert min(*times, row["eager_forward"], row["eager_backward"]) > 0
        assert f"{row['forward'] * 1e3:.3f}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "conv"], "--only: found no operation with 'conv' in its name"),
        (["--repeats", "0"], "--repeats must be 1 or more"),
        (["--tokens", "1"], f"--tokens must be {SMALL.tokens} or more"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    result = kernels(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
