"""What is compiled, and when; with a compiler that only counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
import torch.fx.experimental._config as symbols
from helpers.lanes import MemoryPieces, lane_config, lane_module, random_conversations, windows
from helpers.launch import run_function
from torch._dynamo.utils import counters

from rxt_dist.kernels.compilation import compiled, compiled_kernel, compiles, recording, set_compile
from rxt_dist.model.stm import initial_stm


class Compiler:
    """In place of ``torch.compile``: notes which functions run compiled."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, function: Any, *, dynamic: bool) -> Any:
        assert dynamic

        def run(*arguments: Any, **options: Any) -> Any:
            self.ran.append(function.__qualname__)
            return function(*arguments, **options)

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    counting = Compiler()
    monkeypatch.setattr(torch, "compile", counting)
    set_compile(True)
    yield counting
    set_compile(False)


def test_regions_run_compiled_in_training_steps(compiler: Compiler) -> None:
    @compiled
    def region(x: float) -> float:
        return 2 * x

    def times(expected: int) -> None:
        compiler.ran.clear()
        assert region(3.0) == 6.0
        assert len(compiler.ran) == expected

    times(1)
    with torch.no_grad():
        times(0)
    with recording(True, training=False):
        times(1)
    with recording(False, training=True):
        times(1)
        assert not torch.is_grad_enabled()
        with recording(False, training=False):
            times(0)
        times(1)
    with pytest.raises(ValueError, match="inside"), recording(False, training=True):
        raise ValueError("inside")
    assert torch.is_grad_enabled()
    with torch.no_grad():
        times(0)
    set_compile(False)
    assert not compiles()
    times(0)


@pytest.mark.usefixtures("compiler")
def test_own_kernels_are_started_as_those_of_the_compiler() -> None:
    assert inductor.static_launch_user_defined_triton_kernels


@pytest.mark.parametrize("with_messages", [True, False])
def test_ranks_that_exchange_rows_never_stop_compiling(compiler: Compiler, with_messages: bool) -> None:
    set_compile(True, with_messages=with_messages)
    assert dynamo.fail_on_recompile_limit_hit is with_messages
    assert inductor.reorder_for_compute_comm_overlap is with_messages


def test_kernels_run_compiled_always(compiler: Compiler) -> None:
    @compiled_kernel
    def kernel(x: float) -> float:
        return 2 * x

    with torch.no_grad():
        kernel(1.0)
    assert len(compiler.ran) == 1
    set_compile(False)
    kernel(1.0)
    assert len(compiler.ran) == 1


def test_a_memory_that_is_drawn_once_is_not_compiled() -> None:
    model = lane_config(model__stm_init="{distribution: standard, shared: true}").model
    expected = initial_stm(model, 3)
    counters.clear()
    set_compile(True)
    try:
        found = initial_stm(model, 3)
    finally:
        set_compile(False)
    assert counters["stats"]["unique_graphs"] == 0
    assert torch.equal(found, expected)


def test_equal_sizes_are_not_taken_for_one_size(compiler: Compiler) -> None:
    assert not symbols.use_duck_shape
    set_compile(False)
    assert symbols.use_duck_shape


LAYER, WRITE, FRESH = "Layer.forward", "MemoryAttention._write", "_with_fresh"
STAGES = {
    "{name: memory_attention, steps: 4, label_noise_level: 0.1, noise_level: 0.1}": {
        *(LAYER, WRITE, FRESH, "_with_noise", "_token_distance", "_difference"),
        "normal_tensor",
        "uniform_tensor",
    },
    "{name: memory_attention, steps: 4, unused_slots: reference}": {
        *(LAYER, WRITE, FRESH, "_token_distance", "_slot_distance", "_difference"),
        "normal_tensor",
        "uniform_tensor",
    },
    "{name: smat, steps: 4, frozen: [encoder, memory_attention]}": {
        *(LAYER, WRITE, FRESH, "_scores", "_logit_gradient", "scaled_gradients"),
        "normal_tensor",
    },
}


def _train_and_evaluate(folder: Path) -> None:
    """Every frozen layer of a training step is compiled, and none of an evaluation."""
    compiler = Compiler()
    torch.compile = compiler  # type: ignore[assignment]
    set_compile(True)
    source = MemoryPieces(random_conversations([3, 1, 5, 2, 4, 7, 1, 6]))
    for stage, regions in STAGES.items():
        config = lane_config(stage, model__stm_init="{distribution: standard, shared: false}")
        module = lane_module(config)
        module.freeze()
        look_back = "smat" in stage
        with windows(source, window=1, look_back=look_back) as steps:
            step = next(steps)
        stm = torch.zeros(2, 4, config.model.stm_size, config.model.embed_dim)
        for training in (True, False):
            compiler.ran.clear()
            module.train(training)
            with torch.set_grad_enabled(training):
                loss, *_ = module(step.batches[0], step.counts, stm)
            if training:
                loss.backward()
                layers = config.model.encoder.num_layers + look_back * config.model.decoder.num_layers
                assert compiler.ran.count(LAYER) == layers, compiler.ran
                assert set(compiler.ran) <= regions, set(compiler.ran) - regions
                assert regions - set(compiler.ran) <= {"uniform_tensor"}
            else:
                assert set(compiler.ran) <= {"normal_tensor", "uniform_tensor", "_scores"}


def test_frozen_parts_of_a_step(tmp_path: Path) -> None:
    assert run_function(1, _train_and_evaluate, tmp_path) == [0]
