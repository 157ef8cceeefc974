"""The plan's tensor-parallel traffic against what the ranks of a group really exchange in a step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed, start_engine
from helpers.lanes import SETTINGS, MemoryPieces, random_conversations, windows
from helpers.launch import run_function

from rxt_dist.config import RunConfig, load_config
from rxt_dist.data.batch import MaskPlan, build_text_batch
from rxt_dist.data.order import Pack
from rxt_dist.data.pieces import Piece
from rxt_dist.model import build_model
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import parallelize, placement
from rxt_dist.train.plan import plan_run

RANKS, WINDOW = 2, 2
DIVIDED = {"parallel.sequence_parallel": True}
CASES: dict[str, dict[str, Any]] = {
    "joint_lm": {},
    "joint_lm, encoder alone": {},
    "joint_lm, dense": {"model.decoder.moe": "null"},
    "memory_attention": {},
    "smat": {"model.decoder.stateless_layers": "[dense, moe]", "model.decoder.dense_layer_dim": 64},
    "smat, frozen decoder": {"model.memory_attention.variant": "self",
                             "model.memory_attention.interlayer_attention": "null"},
}  # fmt: skip
CASES |= {f"{name}; divided": own | DIVIDED for name, own in CASES.items()}
STAGES = {
    "joint_lm, encoder alone": "{name: joint_lm, steps: 2, components: encoder}",
    "smat, frozen decoder": "{name: smat, steps: 2, frozen: [decoder]}",
}


def config_of(case: str) -> RunConfig:
    name = case.partition(";")[0]
    stage = STAGES.get(name, f"{{name: {name.partition(',')[0]}, steps: 2}}")
    values = SETTINGS | {
        "stages": f"[{stage}]",
        "batch.packs": 2,
        "batch.pack_tokens": 64,
        "batch.lanes": 4,
        "batch.window": WINDOW,
        "parallel.tensor_size": RANKS,
    }
    return load_config("tiny", [f"{k}={v}" for k, v in (values | CASES[case]).items()], require_data=False)


class FullPieces:
    fingerprint = "full"
    lengths = np.full(8, 16, dtype=np.int32)
    supervised = lengths - 1

    def read(self, piece: int) -> Piece:
        return Piece(np.random.default_rng(piece).integers(7, 41, 16), 1)

    def read_tokens(self, pieces: np.ndarray) -> np.ndarray:
        return np.concatenate([self.read(piece).tokens for piece in pieces.tolist()])


@contextmanager
def exchanged(group: dist.ProcessGroup) -> Iterator[list[int]]:
    """Bytes that a rank sends on rings of ``group``: [in total]."""
    sent, share = [0], (RANKS - 1) / RANKS
    originals = dist.all_reduce, dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("group") is group:
            sent[0] += int(2 * share * tensor.nbytes)
        return originals[0](tensor, *arguments, **options)

    def all_gather(output_tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("group") is group:
            sent[0] += int(share * output_tensor.nbytes)
        return originals[1](output_tensor, *arguments, **options)

    def reduce_scatter(output: torch.Tensor, input: torch.Tensor, **options: Any) -> Any:
        if options.get("group") is group:
            sent[0] += int(share * input.nbytes)
        return originals[2](output, input, **options)

    replaced = all_reduce, all_gather, reduce_scatter
    dist.all_reduce, dist.all_gather_into_tensor, dist.reduce_scatter_tensor = replaced
    try:
        yield sent
    finally:
        dist.all_reduce, dist.all_gather_into_tensor, dist.reduce_scatter_tensor = originals


def measure(folder: Path) -> None:
    join_deepspeed()
    found = {}
    for case in CASES:
        config = config_of(case)
        mesh = Mesh(RANKS, RANKS, sequence_parallel=config.parallel.sequence_parallel)
        model = build_model(config.model, 0, partial(parallelize, mesh=mesh, rank=dist.get_rank()))
        engine = start_engine(config, model)
        engine.begin_step(0, dict.fromkeys(engine.group_starts, 1e-3))
        if config.stages[0].uses_lanes:
            long = [
                [type(one).of([9] * 6, [8] * 6) for one in conversation]
                for conversation in random_conversations([6] * 6)
            ]
            look_back = config.stages[0].name == "smat"
            with windows(MemoryPieces(long), window=WINDOW, look_back=look_back) as steps:
                next(steps)  # then every lane has something to look back at
                step = next(steps)
            batch, counts = step.batches[0], step.counts
        else:
            pack = Pack(np.arange(8), np.zeros(8, dtype=np.int64))
            batch = build_text_batch(FullPieces(), pack, MaskPlan(3, 0.15), 4)
            counts = engine.module.local_counts(batch)
        model_config = config.model
        stm = torch.zeros(2, 4, model_config.stm_size, model_config.embed_dim)
        groups = placement(model).groups
        assert groups is not None
        with exchanged(groups.tensor) as sent:
            loss, *_ = engine.forward(batch, counts, stm)
            engine.engine.backward(loss, scale_wrt_gas=False)
        found[case] = sent[0]
        engine.close()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("traffic")
    assert run_function(RANKS, measure, folder) == [0] * RANKS
    found: list[dict[str, int]] = [json.loads((folder / f"{r}.json").read_text()) for r in range(RANKS)]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("case", CASES)
def test_the_planned_traffic_is_what_is_exchanged(measured: dict[str, int], case: str) -> None:
    (stage,) = plan_run(config_of(case), RANKS, 41)["stages"]
    planned = stage["communication_bytes"]["tensor_parallel"]
    assert planned == pytest.approx(measured[case], rel=0.05), planned / measured[case]
