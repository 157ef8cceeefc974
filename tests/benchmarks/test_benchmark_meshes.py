"""What ranks send, counted, against what `rxt plan` says; and the program itself."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed
from helpers.launch import run_function

from benchmarks.mesh_names import parse_mesh
from benchmarks.meshes import measure_mesh
from benchmarks.workload import read_config
from rxt_dist.parallel.bootstrap import World

SMALL = {
    "model.seq_len": 16,
    "model.stm_size": 6,
    "model.vocab_size": 64,
    "batch.packs": 8,
    "batch.pack_tokens": 64,
    "batch.lanes": 8,
    "batch.window": 2,
}
LANES = {"smat": 3, "memory_attention": 2}
ZERO = "deepspeed.zero_optimization"
ALL_CUT = {f"{ZERO}.stage3_param_persistence_threshold": 0}
ONE_BY_ONE = {f"{ZERO}.use_multi_rank_bucket_allreduce": False}
# (mesh, stage of tiny, own settings)
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "data": ("dp2", 0, {}),
    "experts": ("ep2", 0, {}),
    "tensors": ("tp2", 0, {}),
    "both, smat": ("tp2-ep2", 3, {"precision": "bf16"}),
    "zero 2, accumulated": ("dp2-zero2", 0, {"batch.micro_packs": 2, "precision": "bf16"}),
    "zero 3": ("dp2-zero3", 0, ALL_CUT),
    "reduced to one rank": ("dp2", 0, ONE_BY_ONE),
    "experts, smat": ("ep2", 3, {}),
    "fp32 sums": ("dp2", 0, {"precision": "bf16", "zero.reduce_dtype": "fp32"}),
    "no scatter": ("dp2", 0, {f"{ZERO}.reduce_scatter": False}),
    "memory attention": ("tp2", 2, {}),
    "sft": ("tp2", 1, {}),
    "zero 3, smat": ("dp2-zero3", 3, ALL_CUT),
}


def measure(folder: Path, ranks: int, names: list[str]) -> None:
    """On every rank: the cases ``names``, one after the other."""
    join_deepspeed()
    rank = dist.get_rank()
    options = Namespace(steps=1, warmup=1, lengths=["16", "16"], interactions=3, folder=folder)
    for name in names:
        mesh_name, stage, own = CASES[name]
        mesh = parse_mesh(mesh_name, ranks)
        overrides = [*(f"{key}={value}" for key, value in (SMALL | own).items()), *mesh.overrides()]
        config, (index,) = read_config("tiny", overrides, stage)
        world = World(rank, rank, ranks, torch.device("cpu"), mesh.tensor_size)
        found = measure_mesh(config, index, world, options, None)
        if world.is_main:
            (folder / f"{name}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", CASES)
def test_x(name, measured):
    found = measured(name)
    print(name)
    for k in found["sent_bytes_for"]:
        print(
            "   ",
            k,
            found["sent_bytes_for"][k],
            found["planned_bytes_for"][k],
            found["sent_bytes_for"][k] / max(1, found["planned_bytes_for"][k]),
        )
    print(found["sent_bytes"], found["calls"])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("m")
    assert run_function(2, measure, folder, 2, list(CASES)) == [0] * 2
    return lambda name: json.loads((folder / f"{name}.json").read_text())
