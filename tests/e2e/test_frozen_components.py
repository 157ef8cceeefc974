"""Components that a memory stage does not train keep every bit of their fp32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import arguments, checkpoints, metrics, tensors

from rxt_dist.config import load_config
from rxt_dist.model import build_model
from rxt_dist.model.canonical import canonical_parts

COMPONENTS = ("encoder", "decoder", "mlm_head", "memory_attention")
STAGES = (
    "[{name: memory_attention, steps: 2}, {name: smat, steps: 2, frozen: [encoder]}, "
    "{name: smat, steps: 2, frozen: [memory_attention]}, {name: smat, steps: 2, frozen: [decoder]}]"
)
MOVES = {
    2: {"memory_attention"},
    4: {"memory_attention", "decoder"},
    6: {"encoder", "decoder"},
    8: {"encoder", "memory_attention"},
}
EMBEDDING = "encoder.embedding.weight"


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request: pytest.FixtureRequest, datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    settings: dict[str, Any] = {
        "precision": request.param,
        "batch.lanes": 4,
        "checkpoint.keep_last": 10,
        "evaluation.max_conversations": 2,
        "stages": STAGES,
        "optimizer.lr": 1e-2,
    }
    run_ranks(2, arguments(datasets, folder / "run", settings), folder).check()
    return folder / "run"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = tensors(checkpoint)
    return {name.removeprefix("weight."): v for name, v in found.items() if name.startswith("weight.")}


def initial(run: Path) -> dict[str, torch.Tensor]:
    """Weights of the model that the run started from, by canonical name."""
    config = load_config(run / "config.yaml")
    model = build_model(config.model, config.seed)
    parameters = dict(model.named_parameters())
    return {
        part.name: parameters[name].detach().flatten()[part.start : part.start + part.numel].view(part.shape)
        for name, parts in canonical_parts(model).items()
        for part in parts
    }


def test_only_what_a_stage_trains_moves(run: Path) -> None:
    before = initial(run)
    for step, folder in checkpoints(run).items():
        after = weights(folder)
        assert after.keys() == before.keys()
        assert all(values.dtype == torch.float32 for values in after.values())
        moved = {name for name, values in after.items() if not torch.equal(values, before[name])}
        assert {name.partition(".")[0] for name in moved - {EMBEDDING}} == MOVES[step], step
        # Shared by encoder and decoder: it trains with whichever of them does.
        assert (EMBEDDING in moved) == bool(MOVES[step] & {"encoder", "decoder"})
        if step == 2:
            # All of memory attention trains, apart from what a zero initial weight cuts off.
            trained = {name for name in after if name.startswith("memory_attention")}
            assert len(moved) >= 0.9 * len(trained), trained - moved
        before = after


def test_memories_and_losses_are_finite_and_stay_fp32(run: Path) -> None:
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in metrics(run))
    for folder in checkpoints(run).values():
        for name, values in tensors(folder).items():
            assert values.dtype == torch.float32, name
            assert torch.isfinite(values).all(), name
