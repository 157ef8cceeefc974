"""--init-from: another run's weights, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import naive
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, checkpoints, evaluations, metrics, relative, tensors, trainer_state

from rxt_dist.checkpoint import CheckpointReader
from rxt_dist.config import load_config
from rxt_dist.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LONG = SMALL | {"stages.0.steps": 20, "stages.1.steps": 8}
SHORT = SMALL | {"stages": "[{name: joint_lm, steps: 2}]", "seed": 9}


@pytest.fixture(scope="module")
def trained(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(2, arguments(datasets, "run", LONG), folder).check()
    return folder / "run"


def first_loss(run_dir: Path, weights: Path | None) -> float:
    """The loss of the first step of ``run_dir`` with fresh weights or those of a checkpoint."""
    config = load_config(run_dir / "config.yaml")
    model = build_model(config.model, config.seed)
    if weights is not None:
        CheckpointReader(weights).load_weights(model)
    with naive.whole_steps(config, 0) as batches, torch.no_grad():
        return naive.loss(naive.means(model, [next(batches)]), config, 0).item()


@pytest.mark.parametrize("step", [20, 28, None], ids=["checkpoint", "last checkpoint", "run folder"])
def test_a_run_starts_from_the_weights_of_another(
    trained: Path, datasets: Datasets, tmp_path: Path, step: int | None
) -> None:
    source = trained if step is None else checkpoints(trained)[step]
    command = [*arguments(datasets, "run", SHORT), "--init-from", str(source)]
    run_ranks(1, command, tmp_path).check()
    run_dir = tmp_path / "run"

    records = metrics(run_dir)
    loss = first_loss(run_dir, checkpoints(trained)[step or 28])
    assert relative(records[0]["loss"], loss) <= 1e-5
    assert loss < first_loss(run_dir, None) - 0.5
    if step == 20:  # the end of the same stage: where its evaluation stood, the next run begins
        assert relative(loss, evaluations(trained)[0]["loss"]) < 0.05

    # Everything but the weights is new: steps, tokens, schedule, moments, data.
    assert [(record["step"], record["lr"]) for record in records] == [(1, 5e-4), (2, 1e-3)]
    assert records[0]["total_tokens"] == records[0]["tokens"]
    assert trainer_state(checkpoints(run_dir)[2])["optimizer_steps"] == [2]


def test_initial_weights_are_taken_over_unchanged(trained: Path, datasets: Datasets, tmp_path: Path) -> None:
    """What a stage does not train stays bit by bit as the other run left it."""
    settings = SHORT | {"stages": "[{name: joint_lm, steps: 2, components: encoder}]", "precision": "bf16"}
    command = [*arguments(datasets, "run", settings), "--init-from", str(trained)]
    run_ranks(2, command, tmp_path).check()
    before = tensors(checkpoints(trained)[28])
    after = tensors(checkpoints(tmp_path / "run")[2])
    decoder = [name for name in after if name.startswith("weight.decoder.")]
    assert decoder
    assert [name for name in decoder if not torch.equal(after[name], before[name])] == []
