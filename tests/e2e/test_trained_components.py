"""Stages that train one component: what is frozen stays bit by bit, everything else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, checkpoints, evaluations, metrics, tensors

from rxt_dist.config import load_config
from rxt_dist.model import build_model
from rxt_dist.model.canonical import canonical_parts

STEPS = 3
STAGES = (
    f"[{{name: joint_lm, steps: {STEPS}, components: decoder}}, "
    f"{{name: joint_lm, steps: {STEPS}, components: encoder}}, "
    f"{{name: interaction_sft, steps: {STEPS}}}]"
)
EMBEDDING = "weight.encoder.embedding.weight"
FROZEN_IN_DECODER = (".cross_attention.", ".cross_norm.", ".stm_norm.")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def states(
    request: pytest.FixtureRequest, datasets: Datasets, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, torch.Tensor]]:
    """All weights before the first stage and after each; in bf16 the engine casts what it touches."""
    folder = tmp_path_factory.mktemp("components")
    settings = SMALL | {"stages": STAGES, "precision": request.param, "checkpoint.keep_last": 3}
    run_ranks(2, arguments(datasets, "run", settings), folder).check()
    run_dir = folder / "run"
    config = load_config(run_dir / "config.yaml")
    model = build_model(config.model, config.seed)
    parameters = dict(model.named_parameters())
    initial = {
        f"weight.{part.name}": parameters[name]
        .detach()
        .flatten()[part.start :][: part.numel]
        .view(part.shape)
        for name, parts in canonical_parts(model).items()
        for part in parts
    }
    stored = [tensors(path) for path in checkpoints(run_dir).values()]
    assert len(stored) == 3
    weights = [{name: value for name, value in state.items() if name in initial} for state in stored]
    assert all(state.keys() == initial.keys() for state in weights)
    return [initial, *weights]


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, values in after.items() if not torch.equal(values, before[name])}


def test_a_decoder_alone_trains_without_what_reads_the_memory(states: list[dict[str, torch.Tensor]]) -> None:
    decoder = {name for name in states[0] if name.startswith("weight.decoder.")}
    frozen = {name for name in decoder if any(part in name for part in FROZEN_IN_DECODER)}
    # 2 layers of q, k, v, out weight and bias, and two norms of one scale each.
    assert len(frozen) == 14
    assert moved(states[0], states[1]) == decoder - frozen | {EMBEDDING}


def test_an_encoder_alone_trains_with_its_head(states: list[dict[str, torch.Tensor]]) -> None:
    expected = {name for name in states[0] if name.startswith(("weight.encoder.", "weight.mlm_head."))}
    assert moved(states[1], states[2]) == expected


def test_a_joint_stage_trains_both(states: list[dict[str, torch.Tensor]]) -> None:
    """Also what an earlier stage had frozen."""
    expected = {name for name in states[0] if not name.startswith("weight.memory_attention.")}
    assert moved(states[2], states[3]) == expected


def test_only_losses_of_the_trained_component_are_recorded(datasets: Datasets, tmp_path: Path) -> None:
    settings = SMALL | {"stages": STAGES.replace(f"steps: {STEPS}", "steps: 2")}
    run_ranks(1, arguments(datasets, "run", settings), tmp_path).check()
    decoder, encoder, joint = (metrics(tmp_path / "run")[index] for index in (0, 2, 4))
    names = {"mlm_loss", "mlm_accuracy", "ar_loss", "ar_accuracy", "aux_loss"}
    of_encoder = {"mlm_loss", "mlm_accuracy"}
    assert names & decoder.keys() == names - of_encoder
    assert names & encoder.keys() == of_encoder
    assert names & joint.keys() == names
    evaluated = evaluations(tmp_path / "run")
    assert [names & record.keys() for record in evaluated] == [names - of_encoder, of_encoder, names]
    assert [len(record["samples"]) for record in evaluated] == [1, 0, 1]
