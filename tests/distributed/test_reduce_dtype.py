"""In what gradients are summed over ranks, against sums of the ranks' own gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed, start_engine
from helpers.expert_cases import Case, reduced_gradients, text_steps, whole_model
from helpers.launch import run_function

from rxt_dist.config import RunConfig
from rxt_dist.model.canonical import canonical_parts
from rxt_dist.stages import build_stage

RANKS = 2
CASES = {
    f"{precision}, summed in {dtype}, ZeRO {zero}": Case(
        "joint_lm", RANKS, 1, zero, settings=(("precision", precision), ("zero.reduce_dtype", dtype))
    )
    for precision, dtype in (("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "auto"))
    for zero in (1, 2, 3)
}


def own_gradients(case: Case, config: RunConfig, batch: object, counts: dict[str, int]) -> dict:
    """Of this rank's share of the loss, by autograd alone, in the precision of the run."""
    model = whole_model(case)
    module = build_stage(model, config, config.stages[0])
    module.to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    module(batch, counts)[0].backward()
    return {
        part.name: part.of(model.get_parameter(name).grad.flatten())
        for name, parts in canonical_parts(model).items()
        if model.get_parameter(name).grad is not None
        for part in parts
    }


def measure(folder: Path) -> None:
    join_deepspeed()
    for name, case in CASES.items():
        config = case.config()
        model = whole_model(case)
        parts = canonical_parts(model)
        engine = start_engine(config, model)
        ((batch, counts),) = next(text_steps(case, engine, dist.get_rank()))
        loss, *_ = engine.forward(batch, counts, None)
        engine.backward(loss)
        reduced = {
            key: boxes[0][1].view(-1) for key, boxes in reduced_gradients(engine, model, parts).items()
        }
        engine.engine.step()
        engine.close()
        own = own_gradients(case, config, batch, counts)
        torch.save({"reduced": reduced, "own": own}, folder / f"{name}-{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    assert run_function(RANKS, measure, folder) == [0] * RANKS
    return folder


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_summed_in_the_type_that_is_asked_for(measured: Path, name: str) -> None:
    ranks = [torch.load(measured / f"{name}-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    in_bf16 = name.partition(", summed in ")[2].partition(",")[0] != "fp32"
    equal = total = differing = 0
    assert ranks[0]["own"].keys() == ranks[0]["reduced"].keys()
    for key, first in ranks[0]["own"].items():
        second = ranks[1]["own"][key]
        exact = first.float() + second.float()
        rounded = (first.bfloat16() + second.bfloat16()).float()
        for found in ranks:
            values = found["reduced"][key].float()
            equal += int((values == (rounded if in_bf16 else exact)).sum())
            differing += int((values == (exact if in_bf16 else rounded)).sum())
            total += values.numel()
    # A few elements may be rounded the other way, where engine and autograd differ in the last bit.
    assert equal >= 0.999 * total, (equal, total)
    assert differing < 0.9 * total
