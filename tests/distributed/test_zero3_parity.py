"""Weights, gradients and optimizer state cut over the ranks, against autograd in one process."""

from __future__ import annotations

import pytest
from helpers.expert_cases import OPTIMIZERS, Case
from helpers.parity import Results, assert_one_process, results_of

OFFLOADED = (("zero.offload_optimizer", "cpu"),)
SMALL_PORTIONS = (
    ("deepspeed.zero_optimization.sub_group_size", 4000),
    ("deepspeed.zero_optimization.stage3_prefetch_bucket_size", 3000),
    ("zero.reduce_bucket_size", 5000),
)
WHOLE_SMALL_ONES = (("deepspeed.zero_optimization.stage3_param_persistence_threshold", 500),)
COVERING = [
    Case("joint_lm", 2, 1, zero=3, accumulation=2),
    Case("smat, decoder joins", 2, 1, zero=3, recompute="interaction", settings=OFFLOADED),
]
MATRIX = [
    Case(stage, world, 1, 3, accumulation)
    for stage in ("joint_lm", "smat")
    for world in (1, 2, 4)
    for accumulation in (1, 2)
]
MATRIX += [
    Case("smat, frozen decoder", 2, 1, 3),
    Case("smat, always fresh", 4, 1, 3, variant="global bias, two shared"),
    Case("joint_lm", 4, 1, 3, variant="top 1, unused expert"),
    Case("smat", 2, 1, 3, variant="no bias", settings=SMALL_PORTIONS),
    Case("joint_lm", 2, 1, zero=3, accumulation=2, settings=SMALL_PORTIONS),
    Case("smat, decoder joins", 2, 1, zero=3, accumulation=2, settings=WHOLE_SMALL_ONES),
    Case("smat", 2, 1, zero=2, accumulation=2, settings=OFFLOADED),
    Case("smat, decoder joins", 4, 1, 1, accumulation=2, settings=OFFLOADED),
    Case("smat", 4, 2, 2, settings=OFFLOADED),
    Case("joint_lm", 2, 2, 1, accumulation=2, settings=OFFLOADED),
]
SLOW = [case for case in MATRIX if case not in COVERING]
CASES = [*COVERING, *SLOW]
PARAMETERS = [
    pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else [], id="-".join(map(str, case)))
    for case in CASES
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of([(case, name) for case in CASES for name in OPTIMIZERS], SLOW, tmp_path_factory)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", PARAMETERS)
def test_ranks_compute_what_one_process_computes(results: Results, case: Case, optimizer: str) -> None:
    assert_one_process(case, optimizer, results(case, optimizer))
