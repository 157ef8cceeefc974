"""What autograd keeps for the backward pass on ranks that share tensors, with and without dividing tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed
from helpers.expert_cases import Pieces
from helpers.lanes import SETTINGS, MemoryPieces, random_conversations, windows
from helpers.launch import run_function

from rxt_dist.config import RunConfig, load_config
from rxt_dist.data.batch import MaskPlan, build_text_batch
from rxt_dist.data.order import Pack
from rxt_dist.model import build_model
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import parallelize
from rxt_dist.stages import build_stage
from rxt_dist.train.plan import plan_run

RANKS, WIDTH = 2, 64
STAGES = ("joint_lm", "context_sft", "memory_attention", "smat")


def config_of(stage: str, divided: bool) -> RunConfig:
    values = SETTINGS | {
        "stages": f"[{{name: {stage}, steps: 2}}]",
        "batch.window": 1,
        "batch.packs": 1,
        "parallel.tensor_size": RANKS,
        "parallel.sequence_parallel": divided,
        # Nothing else is as wide as the model, and no rank sends as many rows to experts as there are tokens.
        "model.embed_dim": WIDTH,
        "model.encoder.ff_dim": 72,
        "model.decoder.ff_dim": 80,
        "model.decoder.moe.top_k": 1,
        "model.decoder.stm_norm": True,
    }
    return load_config("tiny", [f"{key}={value}" for key, value in values.items()], require_data=False)


def batch_of(config: RunConfig, module: Any) -> tuple[Any, dict[str, int], list[int]]:
    """A micro-batch, its counts, and the tokens of a pass and of a loss over the vocabulary."""
    if config.stages[0].name == "joint_lm":
        pack = Pack(np.arange(8), np.zeros(8, dtype=np.int64))
        batch = build_text_batch(Pieces(), pack, MaskPlan(77, 0.3), 4)
        return batch, module.local_counts(batch), [batch.tokens.numel(), batch.next_index.numel()]
    long = [[type(o).of([9] * 7, [8] * 5) for o in one] for one in random_conversations([6] * 6)]
    look_back = config.stages[0].name != "memory_attention"
    with windows(MemoryPieces(long), window=1, look_back=look_back) as steps:
        next(steps)
        step = next(steps)
    (at,) = step.batches[0].positions
    return step.batches[0], step.counts, [at.tokens.numel(), at.next_index.numel()]


def kept_by(module: Any, batch: Any, counts: dict[str, int], stm: torch.Tensor) -> tuple[int, list[Any]]:
    """Bytes and shapes of what a forward pass keeps besides parameters, one tensor for each storage."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, *_ = module(batch, counts, stm)
    loss.backward()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), [list(t.shape) for t in kept.values()]


def measure(folder: Path) -> None:
    join_deepspeed()
    found = {}
    for stage in STAGES:
        for divided in (False, True):
            config = config_of(stage, divided)
            mesh = Mesh(RANKS, RANKS, sequence_parallel=divided)
            model = build_model(config.model, 3, lambda one, at=mesh: parallelize(one, at, dist.get_rank()))
            module = build_stage(model, config, config.stages[0])
            batch, counts, tokens = batch_of(config, module)
            stm = torch.zeros(2, 4, config.model.stm_size, WIDTH)
            size, shapes = kept_by(module, batch, counts, stm)
            found[f"{stage} {divided}"] = {"bytes": size, "shapes": shapes, "tokens": tokens}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kept")
    assert run_function(RANKS, measure, folder) == [0] * RANKS
    found: dict[str, Any] = json.loads((folder / "0.json").read_text())
    return found


def whole_rows(found: dict[str, Any]) -> list[tuple[int, ...]]:
    """Kept tensors of the model's width that have all tokens of a pass or of a loss."""
    shapes = [tuple(shape) for shape in found["shapes"] if len(shape) > 1]
    return [one for one in shapes if one[-1] == WIDTH and one[-2] in found["tokens"]]


@pytest.mark.parametrize("stage", STAGES)
def test_no_rank_keeps_all_tokens_between_products(measured: dict[str, Any], stage: str) -> None:
    assert len(whole_rows(measured[f"{stage} False"])) >= 3
    # The loss of memory attention compares rows of all tokens, in the same way on all ranks.
    compared = 2 if stage == "memory_attention" else 0
    assert len(whole_rows(measured[f"{stage} True"])) == compared


@pytest.mark.parametrize("stage", STAGES)
def test_fewer_bytes_are_kept_as_the_plan_says(measured: dict[str, Any], stage: str) -> None:
    kept = [measured[f"{stage} {divided}"]["bytes"] for divided in (False, True)]
    planned = [
        plan_run(config_of(stage, divided), RANKS, 41)["stages"][0]["memory_bytes"]["activations"]
        for divided in (False, True)
    ]
    assert kept[1] < 0.92 * kept[0]
    assert planned[1] / planned[0] == pytest.approx(kept[1] / kept[0], rel=0.12)
