"""Nothing of a training step with experts waits for the device, but one copy of counts a layer at ep > 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed
from helpers.expert_cases import Case, conversations, model_of_rank, text_batch, whole_model
from helpers.host_waits import waits_of
from helpers.interpreter import interpret
from helpers.lanes import windows
from helpers.launch import run_function

from rxt_dist.model.moe import MoE
from rxt_dist.stages import StageModule, build_stage
from rxt_dist.stages.expert_balance import ExpertBalance

BALANCED = "switch, z, bias, top 1"
CASES = {
    "text": Case("joint_lm", 2, 1, variant=BALANCED),
    "lanes": Case("smat", 2, 1, variant=BALANCED),
    "lanes, computed again": Case("smat", 2, 1, variant=BALANCED, recompute="interaction"),
}
PASSES = {"text": 1, "lanes": 1, "lanes, computed again": 3}
"""Times that the decoder runs in a step: once for a window, or for each position and again for most."""


def batches(case: Case) -> Iterator[Any]:
    if case.stage == "joint_lm":
        yield text_batch(case, range(4), 0)
        return
    with windows(conversations(case), window=2, lanes=4) as steps:
        yield next(steps).batches[0]


def step_of(case: Case, rank: int) -> tuple[Callable[[], None], int]:
    """A forward and backward pass and the balance of its experts; the number of layers with experts."""
    config = case.config()
    model = model_of_rank(case, whole_model(case), rank)
    module: StageModule = build_stage(model, config, config.stages[0])
    (batch,) = batches(case)
    counts = dict.fromkeys(("tokens", "masked", "next", "answer", "interactions", "resets"), 9)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, MoE)}
    balance = ExpertBalance(layers)
    stm = torch.zeros(2, 4, config.model.stm_size, config.model.embed_dim)

    def step() -> None:
        module.observe(torch.device("cpu"))
        balance.begin_step()
        loss, _, _ = module(batch, counts, None if case.stage == "joint_lm" else stm)
        loss.backward()
        balance.end_step()

    step()  # what is made once, such as indices of a layout, may wait
    return step, len(layers)


@pytest.mark.parametrize("name", CASES)
def test_whole_experts_never_wait(name: str) -> None:
    step, layers = step_of(CASES[name]._replace(world=1), 0)
    assert layers == 2
    assert waits_of(step) == []


def train_spread(folder: Path) -> None:
    join_deepspeed()
    found = {}
    for name, case in CASES.items():
        step, _ = step_of(case._replace(expert_size=2), dist.get_rank())
        found[name] = waits_of(step)
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_spread_experts_wait_once_a_layer_and_pass(tmp_path: Path) -> None:
    assert run_function(2, train_spread, tmp_path) == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == {name: ["rxt_dist/expert_messages.py:read"] * (2 * PASSES[name]) for name in CASES}


def train_with_rooms(folder: Path) -> None:
    join_deepspeed()
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        step, _ = step_of(Case("smat", 2, 2, recompute="interaction"), dist.get_rank())
        step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is imported for the GPU")
def test_what_is_computed_again_has_the_same_sizes(tmp_path: Path) -> None:
    """Although rows of experts get the room that was needed before; autograd compares sizes."""
    assert run_function(2, train_with_rooms, tmp_path) == [0, 0]


def train_divided(folder: Path) -> None:
    join_deepspeed()
    found = {}
    for name, case in CASES.items():
        step, _ = step_of(case._replace(tensor_size=2, sequence=True), dist.get_rank())
        found[name] = waits_of(step)
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_divided_tokens_never_wait(tmp_path: Path) -> None:
    assert run_function(2, train_divided, tmp_path) == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == {name: [] for name in CASES}
