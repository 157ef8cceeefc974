"""Experts spread over ranks against autograd in one process: loss, gradients, norm, updates."""

from __future__ import annotations

import pytest
from helpers.expert_cases import Case
from helpers.parity import Results, assert_one_process, parameters_of, results_of

TO_ONE_RANK = (("deepspeed.zero_optimization.use_multi_rank_bucket_allreduce", False),)
COVERING = [
    Case("joint_lm", 2, 2, zero=2, accumulation=2),
    Case("joint_lm", 2, 1, variant="top 1, unused expert"),
    Case("joint_lm", 2, 2, variant="top 1, unused expert"),
    Case("smat", 2, 2, accumulation=2, variant="global bias, two shared"),
    Case("smat", 2, 2, zero=2, variant="no bias", recompute="interaction"),
    Case("smat, decoder joins", 2, 2, zero=2),
    Case("joint_lm", 2, 2, zero=2, accumulation=2, variant="switch, z, bias, top 1"),
    Case("smat", 2, 1, accumulation=2, variant="switch, z, bias, top 1", recompute="interaction"),
    Case("joint_lm", 4, 2, zero=2, accumulation=2, variant="eight experts"),
    Case("joint_lm", 4, 4, variant="top 1, unused expert"),
    Case("smat", 4, 4, zero=2, accumulation=2, variant="eight experts"),
    Case("smat, always fresh", 4, 4),
    Case("smat, frozen decoder", 4, 2, zero=2),
    Case("smat", 4, 2, zero=2, accumulation=2, settings=TO_ONE_RANK),
    Case("joint_lm", 2, 1, settings=TO_ONE_RANK),
]
MATRIX = [
    Case(stage, world, size, zero, accumulation)
    for stage in ("joint_lm", "smat")
    for world in (2, 4)
    for size in (1, 2, 4)
    for zero in (1, 2)
    for accumulation in (1, 2)
    if size <= world
]
BALANCE = [
    Case(stage, world, size, zero, variant=variant)
    for variant in ("switch, z", "selection bias", "switch, z, bias, top 1")
    for stage, world, size, zero in (
        ("joint_lm", 4, 4, 1),
        ("joint_lm", 2, 1, 2),
        ("smat", 4, 2, 2),
        ("smat, decoder joins", 2, 2, 1),
        ("smat, frozen decoder", 2, 2, 2),
    )
]
SLOW = [case for case in (*MATRIX, *BALANCE) if case not in COVERING]
CASES = [*COVERING, *SLOW]
# Gradients, norm and moments show every error of AdamW; plain SGD shows the updates without a second moment.
WITH_SGD = (COVERING[0], COVERING[3], COVERING[8])
MEMBERS = [
    (case, optimizer)
    for case in CASES
    for optimizer in (("AdamW", "SGD") if case in WITH_SGD else ("AdamW",))
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(MEMBERS, SLOW, tmp_path_factory)


@pytest.mark.parametrize(("case", "optimizer"), parameters_of(MEMBERS, SLOW))
def test_a_mesh_computes_what_one_process_computes(results: Results, case: Case, optimizer: str) -> None:
    assert_one_process(case, optimizer, results(case, optimizer))
