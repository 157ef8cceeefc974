"""How a training step runs: it does not wait for the device, and once compiled it stays so.

In bf16 with ZeRO 1 it waits nowhere. In fp32 DeepSpeed 0.19.8 asks whether the norm of the gradients is
finite (``is_invalid_grad_norm``); with ZeRO 2 it does so where it clips.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers.host_waits import host_waits
from helpers.launch import run_function
from helpers.step_guards import STAGES, loop_of, losses_of, one_rank, prepared

from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.kernels.compilation import set_compile

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = "precision=bf16"
UNAVOIDABLE = {"fp32": ["deepspeed/utils.py:is_invalid_grad_norm"], "bf16": []}
# Without CUDA, PyTorch's AdamW reads its step counter, which is a tensor on the host.
ON_CPU = "deepspeed/stage_1_and_2.py:_optimizer_step"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
COMPILE = "runtime.compile=true"
ALL_CUT = ("zero.stage=3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
BOUND = 0.01
"""Losses of eager and compiled steps may differ by bf16's roundings: by 1 % at most within 20 updates."""


def waits(
    device: torch.device, folder: Path, *overrides: str, stages: Sequence[str] = STAGES
) -> dict[str, list[str]]:
    """Places where the host waits in one step of ``stages``, after some steps of warm-up."""
    found = {}
    with one_rank(device) as world, prepared(overrides, folder, world) as config:
        for name in stages:
            with loop_of(config, name, world) as loop:
                losses_of(loop, 3)
                with host_waits(device) as places:
                    loop.step()
                found[name] = list(places)
    return found


def check_waits(found: dict[str, list[str]], precision: str) -> None:
    assert found == dict.fromkeys(STAGES, UNAVOIDABLE[precision])


def curves(
    device: torch.device, folder: Path, names: list[str], *overrides: str
) -> dict[str, list[list[float]]]:
    """Losses of 20 steps of stages, eager and compiled, and how many graphs were compiled in the last ten."""
    from torch._dynamo.utils import counters

    found: dict[str, list[list[float]]] = {name: [] for name in names}
    with one_rank(device) as world:
        for compiled in (False, True):
            with prepared((*overrides, *([COMPILE] if compiled else [])), folder, world) as config:
                for name in names:
                    torch.compiler.reset()
                    counters.clear()
                    with loop_of(config, name, world) as loop:
                        losses = losses_of(loop, 10)
                        warm = counters["stats"]["unique_graphs"]
                        losses += losses_of(loop, 10)
                        new = counters["stats"]["unique_graphs"] - warm
                    found[name] += [losses, [float(warm), float(new)]]
    return found


def check_curves(found: dict[str, list[list[float]]], bound: float) -> None:
    for name, (eager, no_graphs, compiled, graphs) in found.items():
        assert no_graphs == [0, 0], name
        assert graphs[0] > 0, f"{name}: nothing was compiled"
        assert graphs[1] == 0, f"{name}: {graphs[1]:.0f} graphs were compiled after 10 steps"
        differences = [abs(a - b) / max(abs(a), 0.1) for a, b in zip(eager, compiled, strict=True)]
        assert len(differences) == 20
        assert max(differences) < bound, (name, differences)


def _write(folder: Path, work: str, *arguments: object) -> None:
    """What a forked rank runs: a function of this module, whose result it leaves in ``folder``."""
    result = globals()[work](CPU, folder, *arguments)
    (folder / "found.json").write_text(json.dumps(result))


def in_own_process(folder: Path, work: str, *arguments: object, timeout: float = 180.0) -> dict[str, list]:  # type: ignore[type-arg]
    assert run_function(1, _write, folder, work, *arguments, timeout=timeout) == [0]
    found: dict[str, list] = json.loads((folder / "found.json").read_text())  # type: ignore[type-arg]
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_needs_a_value_of_the_device(tmp_path: Path, precision: str) -> None:
    found = in_own_process(tmp_path, "waits", f"precision={precision}")
    on_device = {name: [place for place in places if place != ON_CPU] for name, places in found.items()}
    check_waits(on_device, precision)


class TestWatcher:
    """What is found, and what is not."""

    @pytest.mark.parametrize(
        "work",
        [
            lambda x: x.sum().item(),
            lambda x: bool((x > 0).all()),
            lambda x: x.tolist(),
            lambda x: x[x > 0],
            lambda x: x.nonzero(),
            lambda x: torch.repeat_interleave(x.abs().long()),
            lambda x: x.masked_fill_(x > 0, 1.0) if float(x[0]) > 9 else x,
            lambda x: x.unique(),
            lambda x: get_accelerator().synchronize(),
        ],
    )
    def test_waiting(self, work: object) -> None:
        with host_waits(CPU) as found:
            work(torch.tensor([1.0, -2.0, 3.0]))  # type: ignore[operator]
        assert found

    def test_not_waiting(self) -> None:
        x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        with host_waits(CPU) as found:
            y = torch.where(x > 0, x, 0.0)[torch.tensor([2, 0])].masked_fill(torch.tensor([True, False]), 2.0)
            torch.repeat_interleave(y, torch.tensor([1, 2]), output_size=3).sort().values.sum().backward()
        assert found == []

    def test_the_backward_pass_is_watched_too(self) -> None:
        class Asks(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
                return gradients[0] * float(gradients[0].sum())

        loss = Asks.apply(torch.ones(3, requires_grad=True)).sum()
        with host_waits(CPU) as found:
            loss.backward()
        assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(), ALL_CUT], ids=["whole", "cut"])
def test_compiled_on_a_cpu(tmp_path: Path, weights: Sequence[str]) -> None:
    tiny = (BF16, "model.embed_dim=32", *weights)  # the norm of fp32 on a CPU is one that no GPU runs
    found = in_own_process(tmp_path, "curves", ["joint_lm", "memory_attention", "smat"], *tiny, timeout=900)
    check_curves(found, bound=BOUND)


class TestOnGpu:
    """The same on a CUDA device."""

    pytestmark = needs_gpu

    @pytest.fixture(scope="class", autouse=True)
    def _one_process_group(self) -> Iterator[None]:
        """DeepSpeed remembers groups, so that a process has one process group for all its tests."""
        with one_rank(CUDA):
            yield
        set_compile(False)
        set_attention_backend("sdpa", CPU, torch.float32)

    def test_no_step_waits(self, tmp_path: Path) -> None:
        check_waits(waits(CUDA, tmp_path, BF16), "bf16")

    @pytest.mark.parametrize("stage", STAGES)
    def test_no_compiled_step_waits(self, tmp_path: Path, stage: str) -> None:
        assert waits(CUDA, tmp_path, BF16, COMPILE, stages=[stage]) == {stage: []}

    @pytest.mark.parametrize("stage", STAGES)
    def test_compiled(self, tmp_path: Path, stage: str) -> None:
        check_curves(curves(CUDA, tmp_path, [stage], BF16), bound=BOUND)

    @pytest.mark.parametrize("stage", ["joint_lm", "smat"])
    def test_compiled_with_cut_weights(self, tmp_path: Path, stage: str) -> None:
        check_curves(curves(CUDA, tmp_path, [stage], BF16, *ALL_CUT), bound=BOUND)

    def test_the_watcher_sees_what_waits(self) -> None:
        x = torch.ones(3, device=CUDA)
        with host_waits(CUDA) as found:
            x = x * 2
        assert found == []
        for wait in (
            lambda: x.sum().item(),
            lambda: x[x > 0],  # may wait more than once
            lambda: torch.cuda.synchronize(),  # looked up when it is watched
            lambda: torch.cuda.current_stream().synchronize(),
        ):
            with host_waits(CUDA) as found:
                wait()
            assert found
