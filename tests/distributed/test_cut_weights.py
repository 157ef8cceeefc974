"""What ranks hold, send and round when weights are cut over them."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import z3_leaf_module
from helpers.engines import join_deepspeed, start_engine
from helpers.expert_cases import Case, lane_steps, text_batch, text_steps, whole_model
from helpers.launch import run_function
from torch.multiprocessing.reductions import StorageWeakRef

from rxt_dist.kernels.compilation import set_compile
from rxt_dist.model import build_model
from rxt_dist.model.layer import Layer
from rxt_dist.model.model import empty_model
from rxt_dist.stages import build_stage
from rxt_dist.train.engine import StageEngine
from rxt_dist.train.plan import plan_run

RANKS = 2
KEPT = ("deepspeed.zero_optimization.stage3_max_reuse_distance", 1_000_000)
COMPILED = (("precision", "bf16"), ("runtime.compile", True))
CASES = {
    "text": Case("joint_lm", RANKS, 1, zero=3, accumulation=2),
    "text, weights kept": Case("joint_lm", RANKS, 1, zero=3, settings=(KEPT,)),
    "window": Case("smat", RANKS, 1, zero=3),
    "window, recomputed": Case("smat", RANKS, 1, zero=3, recompute="interaction"),
    "window, weights kept": Case("smat", RANKS, 1, zero=3, settings=(KEPT,)),
    "text, compiled": Case("joint_lm", RANKS, 1, zero=3, accumulation=2, settings=COMPILED),
    "window, compiled": Case("smat", RANKS, 1, zero=3, settings=COMPILED),
    "window, recomputed, compiled": Case(
        "smat", RANKS, 1, zero=3, recompute="interaction", settings=COMPILED
    ),
}


QUICK = ("text", "window")
PARAMETERS = [pytest.param(name, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
KEEPING = [name for name, case in CASES.items() if KEPT in case.settings]
Measured = Callable[[str], list[dict[str, Any]]]


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends meanwhile, of weights and of gradients, with ring algorithms."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters

    sent = {"parameter_all_gather": 0, "gradient_reduction": 0}
    gather, reduce = partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn

    def count(name: str, whole: torch.Tensor) -> None:
        sent[name] += whole.numel() * whole.element_size() * (RANKS - 1) // RANKS

    def counted_gather(part: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        count("parameter_all_gather", whole)
        return gather(part, whole, group)

    def counted_reduce(whole: torch.Tensor, part: torch.Tensor, **options: Any) -> Any:
        count("gradient_reduction", whole)
        return reduce(whole, part, **options)

    partition_parameters._dist_allgather_fn = counted_gather
    coalesced_collectives._torch_reduce_scatter_fn = counted_reduce
    yield sent
    partition_parameters._dist_allgather_fn = gather
    coalesced_collectives._torch_reduce_scatter_fn = reduce


def gathered_modules(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Those whose weights DeepSpeed gathers when they compute."""
    yield module
    if not z3_leaf_module(module):
        for part in module.children():
            yield from gathered_modules(part)


@contextmanager
def gathered_storages(module: torch.nn.Module) -> Iterator[list[StorageWeakRef]]:
    """The memory of every weight that is whole while its module computes meanwhile."""
    found: list[StorageWeakRef] = []

    def look(part: torch.nn.Module, _: Any) -> None:
        weights = part.parameters(recurse=z3_leaf_module(part))
        found.extend(StorageWeakRef(p.untyped_storage()) for p in weights)

    hooks = [part.register_forward_pre_hook(look) for part in gathered_modules(module)]
    yield found
    for hook in hooks:
        hook.remove()


def measure(folder: Path, names: list[str]) -> None:
    """On every rank: for every case of ``names`` what the third step sent, and how many gathered weights
    outlive the forward pass."""
    join_deepspeed()
    rank, found = dist.get_rank(), {}
    for name in names:
        case = CASES[name]
        config = case.config()
        set_compile(config.runtime.compile)
        engine = start_engine(config, whole_model(case))
        stm = torch.zeros(2, 4, config.model.stm_size, 32)
        steps = text_steps(case, engine, rank) if case.stage == "joint_lm" else lane_steps(case, rank)
        for number, batches in enumerate(steps):
            engine.begin_step(number, {0: 1e-3})
            with counted() as sent:
                for batch, counts in batches:
                    with gathered_storages(engine.module) as storages:
                        loss, *_ = engine.forward(batch, counts, stm)
                    alive = sum(not storage.expired() for storage in storages)
                    engine.backward_and_step(loss)
        layers = [part for part in engine.module.modules() if isinstance(part, Layer)]
        hooks = [[len(part._forward_pre_hooks) for part in layer.modules()] for layer in layers]
        found[name] = {"sent": sent, "gathered": len(storages), "alive": alive, "hooks": hooks}
        engine.close()
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What the ranks found in a case; all quick or all slow cases share a launch."""

    @cache
    def launch(quick: bool) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("measured")
        names = [name for name in CASES if (name in QUICK) == quick]
        assert run_function(RANKS, measure, folder, names) == [0] * RANKS
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]

    return lambda name: [found[name] for found in launch(name in QUICK)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_plan_counts_what_ranks_send(measured: Measured, name: str) -> None:
    config = CASES[name].config()
    assert isinstance(config.model.vocab_size, int)
    (stage,) = plan_run(config, RANKS, config.model.vocab_size)["stages"]
    for found in measured(name):
        for kind, size in found["sent"].items():
            assert stage["communication_bytes"][kind] == pytest.approx(size, rel=0.02), kind


@pytest.mark.parametrize("name", [p for p in PARAMETERS if p.id not in KEEPING])
def test_a_graph_does_not_keep_gathered_weights(measured: Measured, name: str) -> None:
    for found in measured(name):
        assert found["gathered"] > 50
        assert found["alive"] == 0


@pytest.mark.parametrize("name", QUICK)
def test_a_layer_is_gathered_at_once(measured: Measured, name: str) -> None:
    """Not part by part, each with hooks of its own."""
    for found in measured(name):
        assert found["hooks"]
        for layer, *parts in found["hooks"]:
            assert layer > 0
            assert parts == [0] * len(parts)


def check_evaluation_and_end(folder: Path) -> None:
    """On every rank: the whole module has the initial weights, and a rank may run it alone; a closed engine
    leaves nothing behind."""
    join_deepspeed()
    case = CASES["text"]
    config = case.config()
    engine = start_engine(config, build_model(config.model, config.seed))
    whole = engine.whole_module(lambda: build_stage(empty_model(config.model), config, config.stages[0]))
    initial = build_stage(build_model(config.model, config.seed), config, config.stages[0])
    expected = dict(initial.named_parameters())
    assert expected.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(p, expected[name]) for name, p in whole.named_parameters())
    if dist.get_rank() == 0:
        with torch.no_grad():
            whole.terms(text_batch(case, range(2), 0))
    dist.barrier()
    references = left_behind(engine)
    engine.close()
    del engine, whole
    gc.collect()
    alive = [name for name, reference in references.items() if reference() is not None]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(alive))


def left_behind(engine: StageEngine) -> dict[str, weakref.ref[torch.Tensor]]:
    zero = engine.engine.optimizer
    flat = zero.fp32_partitioned_groups_flat[0]
    moments = zero.optimizer.state[flat]["exp_avg"]
    tensors = {"masters": flat, "moments": moments, "weights": zero.lp_param_buffer}
    return {name: weakref.ref(tensor) for name, tensor in tensors.items()}


def test_whole_weights_for_evaluation_and_nothing_left_at_the_end(tmp_path: Path) -> None:
    assert run_function(RANKS, check_evaluation_and_end, tmp_path) == [0] * RANKS
    for rank in range(RANKS):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == []
