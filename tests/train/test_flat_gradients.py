"""Gradients in flat tensors: the numbers of DeepSpeed's own ZeRO 1, without its work for each parameter."""

from __future__ import annotations

import gc
import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from helpers.engines import join_deepspeed, start_engine
from helpers.expert_cases import (
    Case,
    is_flat,
    reduced_gradients,
    run_on_ranks,
    text_steps,
    whole_model,
)
from helpers.launch import run_function
from torch.utils._python_dispatch import TorchDispatchMode

from rxt_dist.config import deepspeed_config, stage_optimizer
from rxt_dist.model.canonical import canonical_parts
from rxt_dist.train import engine as engine_module
from rxt_dist.train import flat_gradients

RANKS = 2
BF16, SMALL_BUCKETS = ("precision", "bf16"), ("zero.reduce_bucket_size", 3000)
HOST = ("zero.offload_optimizer", "cpu")
EARLY, LATE = ("zero.overlap_comm", True), ("zero.overlap_comm", False)
CASES = {
    "bf16": Case("joint_lm", RANKS, 1, settings=(BF16, EARLY)),
    "bf16, accumulated, small buckets": Case(
        "joint_lm", RANKS, 1, accumulation=2, settings=(BF16, SMALL_BUCKETS, EARLY)
    ),
    "fp32, small buckets, not overlapped": Case("joint_lm", RANKS, 1, settings=(SMALL_BUCKETS, LATE)),
    "experts, a component that joins": Case(
        "smat, decoder joins", RANKS, 2, accumulation=2, settings=(SMALL_BUCKETS, EARLY)
    ),
    "tensors": Case("joint_lm", RANKS, 1, tensor_size=2, settings=(BF16,)),
    "optimizer on the host": Case("joint_lm", RANKS, 1, accumulation=2, settings=(BF16, EARLY, HOST)),
    "optimizer on the host, experts, a component that joins": Case(
        "smat, decoder joins", RANKS, 2, settings=(SMALL_BUCKETS, LATE, HOST)
    ),
}
OPTIMIZER = "AdamW"


def train_all(folder: Path) -> None:
    """All cases as they are, and as DeepSpeed does it after the backward pass."""
    for name in ("ours", "stock"):
        (folder / name).mkdir(exist_ok=True)
        cases = [(number, case, OPTIMIZER) for number, case in enumerate(CASES.values())]
        if name == "stock":
            engine_module.flatten_gradients = lambda zero: False  # type: ignore[assignment]
            cases = [(n, case._replace(settings=(*case.settings, LATE)), o) for n, case, o in cases]
        run_on_ranks(folder / name, cases)


def send_early(folder: Path) -> None:
    """Buckets are sent in every backward pass, those of the first micro-batch excepted."""
    join_deepspeed()
    case = CASES["bf16, accumulated, small buckets"]
    engine = start_engine(case.config(), whole_model(case))
    zero = engine.engine.optimizer
    flat = zero.reduce_gradients.__self__
    for number, batches in enumerate(text_steps(case, engine, dist.get_rank())):
        engine.begin_step(number, dict.fromkeys(engine.group_starts, 0.1))
        for index, (batch, counts) in enumerate(batches):
            loss, *_ = engine.forward(batch, counts, None)
            before: list[int] = []
            reduce = zero.reduce_gradients
            zero.reduce_gradients = lambda *a, r=reduce, b=before, **k: (b.append(flat._reduced), r(*a, **k))
            engine.backward(loss)
            zero.reduce_gradients = reduce
            assert before == ([] if index == 0 else [len(flat._buckets)])
            engine.engine.step()
    engine.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    assert run_function(RANKS, train_all, folder) == [0] * RANKS
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_deepspeed(trained: Path, name: str) -> None:
    number = list(CASES).index(name)
    for rank in range(RANKS):
        file = f"{number}-{rank}.pt"
        ours, stock = (torch.load(trained / kind / file, weights_only=True) for kind in ("ours", "stock"))
        assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-6)
        assert ours["norm"] == pytest.approx(stock["norm"], rel=1e-6)
        assert min(ours["norm"]) > 0.05  # all of them are clipped
        (mine, *_), (theirs, *_) = ours["gradients"], stock["gradients"]
        assert mine.keys() == theirs.keys()
        for key, boxes in mine.items():
            for (starts, values), (other_starts, others) in zip(boxes, theirs[key], strict=True):
                assert starts == other_starts
                assert torch.equal(values.float(), others.float()), key
        assert ours["fragments"].keys() == stock["fragments"].keys()
        for key, (shape, chunks) in ours["fragments"].items():
            assert shape == stock["fragments"][key][0]
            for (where, values), (place, others) in zip(chunks, stock["fragments"][key][1], strict=True):
                assert where == place
                torch.testing.assert_close(values, others, rtol=1e-5, atol=1e-7, msg=key)


def _in_one_process(folder: Path, work: str) -> None:
    join_deepspeed()
    globals()[work](folder)


def run_alone(folder: Path, work: str) -> None:
    assert run_function(1, _in_one_process, folder, work) == [0]


def one_rank(**settings: Any) -> Case:
    return Case("joint_lm", 1, 1, settings=tuple(settings.items()))


def _missing_gradients(folder: Path) -> None:
    """A parameter without gradient counts as one of zeros, also when the step before had one."""
    case = one_rank()
    engine = start_engine(case.config(), whole_model(case))
    zero = engine.engine.optimizer
    for number, batches in enumerate(text_steps(case, engine, 0)):
        engine.begin_step(number, dict.fromkeys(engine.group_starts, 0.1))
        ((batch, counts),) = batches
        loss, *_ = engine.forward(batch, counts, None)
        weight = engine.module.decoder.lm_head.weight
        if number == 1:
            weight.requires_grad_(False)
            loss, *_ = engine.forward(batch, counts, None)
        engine.backward(loss)
        sizes = [parameter.numel() for parameter in zero.bit16_groups[0]]
        pieces = zero.averaged_gradients[0].flat_partition[: sum(sizes)].split(sizes)
        found = {id(p): piece for p, piece in zip(zero.bit16_groups[0], pieces, strict=True)}
        assert bool(found[id(weight)].any()) == (number != 1)
        assert all(parameter.grad is None for parameter in zero.bit16_groups[0])
        engine.engine.step()
        assert engine.gradient_norm() > 0
        weight.requires_grad_(True)
    engine.close()


def _not_finite(folder: Path) -> None:
    """The norm says so, and no weight stays as it was without notice."""
    for precision in ("fp32", "bf16"):
        case = one_rank(precision=precision)
        engine = start_engine(case.config(), whole_model(case))
        ((batch, counts),) = next(text_steps(case, engine, 0))
        engine.begin_step(0, dict.fromkeys(engine.group_starts, 0.1))
        loss, *_ = engine.forward(batch, counts, None)
        engine.backward_and_step(loss * float("inf"))
        assert not torch.isfinite(torch.tensor(engine.gradient_norm())), precision
        engine.close()


def _left_alone(folder: Path) -> None:
    """What is not of the known kind keeps DeepSpeed's own methods."""
    noted: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: noted.append(record.getMessage())  # type: ignore[method-assign]
    flat_gradients.logger.addHandler(handler)
    known = flat_gradients.KNOWN_VERSION
    own = "deepspeed.zero_optimization"
    for zero, version, flat, settings in (
        (1, known, True, {}),
        (1, known, True, {"zero.offload_optimizer": "cpu"}),
        (2, known, False, {}),
        (1, known, False, {f"{own}.use_multi_rank_bucket_allreduce": False}),
        (1, known, True, {f"{own}.use_multi_rank_bucket_allreduce": False, f"{own}.reduce_scatter": False}),
        (1, "0.20.0", False, {}),
    ):
        deepspeed.__version__ = version
        case = one_rank(**settings)._replace(zero=zero)
        model = whole_model(case)
        engine = start_engine(case.config(), model)
        ((batch, counts),) = next(text_steps(case, engine, 0))
        engine.begin_step(0, dict.fromkeys(engine.group_starts, 0.1))
        loss, *_ = engine.forward(batch, counts, None)
        engine.backward(loss)
        assert is_flat(engine.engine.optimizer) == flat
        assert reduced_gradients(engine, model, canonical_parts(model))
        engine.engine.step()
        assert engine.gradient_norm() > 0
        engine.close()
    assert noted == ["DeepSpeed 0.20.0: steps are slower than with 0.19.8"]


def test_buckets_are_sent_while_the_backward_pass_runs(tmp_path: Path) -> None:
    assert run_function(RANKS, send_early, tmp_path) == [0] * RANKS


@pytest.mark.parametrize("norm", [0.5, 1.0, 3.0])
def test_clipping(norm: float) -> None:
    flat = object.__new__(flat_gradients._FlatGradients)
    flat._zero = SimpleNamespace(clip_grad=1.0, optimizer=object())
    gradients = torch.tensor([0.6, 0.8]) * norm
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = expected = gradients.clone()
    assert float(torch.nn.utils.clip_grad_norm_(weight, 1.0)) == pytest.approx(norm)
    flat.clip([gradients], torch.tensor(norm))
    torch.testing.assert_close(gradients, expected)
    flat._zero.clip_grad = 0.0
    flat.clip([gradients], torch.tensor(100.0))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_fused_optimizer_clips_while_it_updates(clip_norm: float) -> None:
    flat = object.__new__(flat_gradients._FlatGradients)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 300, generator=generator)
    ours, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = torch.optim.AdamW([ours], lr=0.1, fused=True)
    expected = torch.optim.AdamW([plain], lr=0.1, fused=False)
    flat._zero = SimpleNamespace(clip_grad=clip_norm, optimizer=optimizer)
    for size in (1e-4, 100.0, 1.0, 0.01):  # norms below and above 1
        gradient = torch.randn(2, 300, generator=generator) * size
        norm = torch.linalg.vector_norm(gradient)
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(plain, clip_norm)
        flat.clip([ours.grad], norm)
        assert torch.equal(ours.grad, gradient)
        optimizer.step()
        expected.step()
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def _fused_and_plain(folder: Path) -> None:
    """DeepSpeed's steps with either AdamW: moments, unlike weights, are in proportion to the gradients."""
    states = []
    for fused in (False, True):
        case = one_rank()
        config, model = case.config(), whole_model(case)
        optimizer = stage_optimizer(config, config.stages[0])
        settings = deepspeed_config(config, config.stages[0], dp_size=1, optimizer=optimizer, fused=fused)
        engine = start_engine(config, model, {"optimizer": settings["optimizer"]})
        for number, ((batch, counts),) in enumerate(text_steps(case, engine, 0)):
            engine.begin_step(number, dict.fromkeys(engine.group_starts, 0.1))
            engine.backward_and_step(engine.forward(batch, counts, None)[0])
            assert engine.gradient_norm() > optimizer.clip_norm
        assert hasattr(engine.engine.optimizer.optimizer, "grad_scale") == fused
        states.append(engine.engine.optimizer.optimizer.state)
        engine.close()
    for plain, ours in zip(*(state.values() for state in states), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert plain[name].any()
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-9)


def _memory_is_given_back(folder: Path) -> None:
    """The optimizer state of an engine is gone when the next one is there."""
    gc.disable()
    alive: list[Any] = []
    for _ in range(2):
        case = one_rank()
        engine = start_engine(case.config(), whole_model(case))
        assert not any(master() is not None for master in alive)
        ((batch, counts),) = next(text_steps(case, engine, 0))
        engine.begin_step(0, dict.fromkeys(engine.group_starts, 0.1))
        engine.backward_and_step(engine.forward(batch, counts, None)[0])
        alive = [weakref.ref(shard.flat) for shard in engine._shards]
        engine.close()
        del engine
        assert all(master() is not None for master in alive)  # else nothing is tested here


class _Count(TorchDispatchMode):
    """Counts what a device would run: operations whose results are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(owner: Any, name: str, count: _Count) -> Iterator[None]:
    """Inside, ``count`` sees a method of ``owner``."""
    method = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        with count:
            return method(*arguments, **options)

    setattr(owner, name, counted)
    yield
    setattr(owner, name, method)


def _operations(folder: Path) -> None:
    """Of reduction, norm, clipping and update: as many for four times the layers."""
    counts = []
    for layers in (1, 4):
        numbers = (("model.encoder.num_layers", layers), ("model.decoder.num_layers", layers))
        case = Case("joint_lm", 1, 1, settings=(BF16, *numbers))
        engine = start_engine(case.config(), whole_model(case))
        for number, ((batch, figures),) in enumerate(text_steps(case, engine, 0)):
            engine.begin_step(number, dict.fromkeys(engine.group_starts, 0.1))
            loss, *_ = engine.forward(batch, figures, None)
            found, zero = _Count(), engine.engine.optimizer
            with watched(zero, "reduce_gradients", found):
                engine.backward(loss)
            with found:
                engine.engine.step()
        counts.append(found.calls)
        engine.close()
    assert counts[0] == counts[1], counts
    assert counts[0].total() < 40, counts[0]
    assert counts[0]["aten._foreach_copy_.default"] == 1


@pytest.mark.parametrize(
    "work",
    [
        "_missing_gradients",
        "_not_finite",
        "_left_alone",
        "_fused_and_plain",
        "_memory_is_given_back",
        "_operations",
    ],
)
def test_on_one_rank(tmp_path: Path, work: str) -> None:
    run_alone(tmp_path, work)


def test_buckets_cover_every_group_in_its_order() -> None:
    flat = object.__new__(flat_gradients._FlatGradients)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (4, 6, 1, 25, 3, 3)]
    flat._zero = SimpleNamespace(reduce_bucket_size=10, round_robin_bit16_groups=[parameters])
    group = flat_gradients._Group(None, 44, torch.float32, slice(0, 44), None)
    flat._groups = [group]
    buckets = flat._buckets_of(0)
    assert [(bucket.start, bucket.stop) for bucket in buckets] == [(0, 10), (10, 11), (11, 36), (36, 44)]
    assert [[p.numel() for p in bucket.parameters] for bucket in buckets] == [[4, 6], [1], [25], [3, 3]]
    assert [bucket.missing for bucket in buckets] == [2, 1, 1, 2]


def test_the_installed_deepspeed_is_the_known_one() -> None:
    """Another one has to be read first: the methods below are replaced and must mean the same."""
    assert deepspeed.__version__ == flat_gradients.KNOWN_VERSION
    step = inspect.getsource(DeepSpeedZeroOptimizer.step)
    for call in (
        "self._wait_for_offload_copies()",
        "self.scaled_global_norm()",
        "single_grad_partition = self.single_partition_of_fp32_groups[i].grad",
        "self._get_preflattened_grad_partition(i)",
        "self.unscale_and_clip_grads([single_grad_partition], scaled_global_grad_norm)",
        "self._update_model_bit16_weights(i)",
    ):
        assert call in step, call
    replaced = {
        "reduce_gradients": ["self", "pipeline_parallel"],
        "scaled_global_norm": ["self", "norm_type"],
        "unscale_and_clip_grads": ["self", "grad_groups_flat", "total_norm"],
        "_update_model_bit16_weights": ["self", "group_index"],
    }
    for name, parameters in replaced.items():
        assert list(inspect.signature(getattr(DeepSpeedZeroOptimizer, name)).parameters) == parameters
