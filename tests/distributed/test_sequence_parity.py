"""Tokens divided between products by ranks that share tensors, against autograd in one process."""

from __future__ import annotations

import pytest
from helpers.expert_cases import OPTIMIZERS, Case
from helpers.parity import Results, assert_one_process, results_of

COVERING = [
    Case("joint_lm", 2, 1, zero=2, accumulation=2, tensor_size=2, sequence=True),
    Case(
        "smat",
        2,
        2,
        tensor_size=2,
        variant="global bias, two shared",
        heads="one kv head, gated",
        sequence=True,
    ),
]
CASES = COVERING
SLOW = []
PARAMETERS = [
    pytest.param(case, optimizer, id="-".join(map(str, (*case, optimizer))))
    for case in CASES
    for optimizer in ("AdamW",)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of([(p.values[0], p.values[1]) for p in PARAMETERS], SLOW, tmp_path_factory)


@pytest.mark.parametrize(("case", "optimizer"), PARAMETERS)
def test_a_mesh_computes_what_one_process_computes(results: Results, case: Case, optimizer: str) -> None:
    assert_one_process(case, optimizer, results(case, optimizer))
