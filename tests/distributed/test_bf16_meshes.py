"""bf16 on two ranks that share tensors, experts or state, against one rank: on the CPU, on two GPUs with
NCCL, and with gloo on one GPU that both have.

Sums over ranks round partial results, and a token near the border of two experts may change sides, so that
runs drift apart slowly. Measured on the CPU: losses to 1.7e-4 of the larger of loss and 1, norms to 4.3e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import REPOSITORY, deepspeed, run_ranks, shell
from helpers.runs import CUT, OFFLOADED, arguments, metrics, relative, untimed

LOSS_BOUND, NORM_BOUND = 1e-3, 5e-3
SETTINGS: dict[str, Any] = {
    "precision": "bf16",
    "batch.packs": 4,
    "batch.pack_tokens": 128,
    "batch.lanes": 4,
    "evaluation.max_packs": 1,
    "evaluation.max_conversations": 2,
    "evaluation.samples": 0,
    "stages": "[{name: joint_lm, steps: 4}, {name: memory_attention, steps: 3}, {name: smat, steps: 3}]",
}
MESHES: dict[str, dict[str, Any]] = {
    "tensors": {"parallel.tensor_size": 2},
    "divided tokens": {"parallel.tensor_size": 2, "parallel.sequence_parallel": True, "zero.stage": 2},
    "experts": {"parallel.expert_size": 2},
    "both": {"parallel.tensor_size": 2, "parallel.expert_size": 2, "zero.stage": 2},
}
COMPILED = {
    "compiled tensors": MESHES["tensors"] | {"runtime.compile": True},
    "compiled, all divided": MESHES["divided tokens"] | {"parallel.expert_size": 2, "runtime.compile": True},
}
COPIED = {
    "copied": MESHES["experts"] | {"runtime.peer_copies": True},
    "compiled, copied": MESHES["experts"] | {"runtime.peer_copies": True, "runtime.compile": True},
}
"""Ranks write tokens into each other's memory, on GPUs only."""
ZERO: dict[str, dict[str, Any]] = {
    "cut weights": CUT,
    "compiled, cut weights": CUT | {"runtime.compile": True},
    "cut weights, offloaded": CUT | OFFLOADED,
    "offloaded": OFFLOADED,
    "ZeRO 2, offloaded": OFFLOADED | {"zero.stage": 2},
    "compiled, offloaded": OFFLOADED | {"runtime.compile": True},
}
"""On GPUs; for the CPU, where only the compiled one is tried here, are test_zero3_parity.py and
e2e/test_zero_runs.py."""
GPUS = {
    name: [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {name}")]
    for name, count in (("two GPUs", 2), ("one GPU", 1))
}


def cases() -> list[Any]:
    """Devices and meshes. PyTorch crashes where gloo brings sums over ranks to compiled code on a GPU."""
    found = [pytest.param("cpu", mesh) for mesh in MESHES]
    found += [
        pytest.param("cpu", mesh, marks=pytest.mark.slow) for mesh in (*COMPILED, "compiled, cut weights")
    ]
    meshes = {"two GPUs": MESHES | COMPILED | COPIED | ZERO, "one GPU": MESHES | COPIED | ZERO}
    return found + [
        pytest.param(device, mesh, marks=GPUS[device]) for device, known in meshes.items() for mesh in known
    ]


Runs = Callable[[str, int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def logged(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Logged steps of a run on a device, ranks and mesh."""

    @cache
    def found(device: str, ranks: int, mesh: str) -> list[dict[str, Any]]:
        folder: Path = tmp_path_factory.mktemp("bf16")
        shared = (MESHES | COPIED | COMPILED | ZERO)[mesh] if ranks > 1 else {}
        command = arguments(datasets, "run", SETTINGS | shared)
        if device == "cpu":
            result = run_ranks(ranks, command, folder, timeout=900.0).check()
        elif device == "two GPUs":
            result = deepspeed(ranks, command, folder, timeout=600.0, gpus=True).check()
        else:
            program = str(REPOSITORY / "tests" / "helpers" / "one_gpu.py")
            launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), program]
            result = shell([*launcher, *command], folder, timeout=600.0, gpus=True).check()
        assert "brings tokens to experts" not in result.output  # which would say that copies were not made
        return metrics(folder / "run")

    return found


@pytest.mark.parametrize(("device", "mesh"), cases())
def test_two_ranks_follow_one_rank_up_to_rounding(logged: Runs, device: str, mesh: str) -> None:
    alone, together = logged(device, 1, "alone"), logged(device, 2, mesh)
    assert len(alone) == len(together) == 10
    for own, reference in zip(together, alone, strict=True):
        assert own["tokens"] == reference["tokens"]
        losses = [name for name in reference if name.endswith("loss")]
        for name in losses:
            bound = LOSS_BOUND * max(1.0, abs(reference[name]))
            assert abs(own[name] - reference[name]) <= bound, (own["step"], name)
        assert relative(own["grad_norm"], reference["grad_norm"]) <= NORM_BOUND, own["step"]
    assert together != alone


@pytest.mark.parametrize("device", [pytest.param(name, marks=marks) for name, marks in GPUS.items()])
def test_copies_bring_what_messages_bring(logged: Runs, device: str) -> None:
    copied, sent = logged(device, 2, "copied"), logged(device, 2, "experts")
    assert untimed(copied) == untimed(sent)
