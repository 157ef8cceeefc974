"""Tensors shared by ranks, alone and with spread experts, against autograd in one process."""

from __future__ import annotations

import pytest
from helpers.expert_cases import OPTIMIZERS, Case
from helpers.mesh_parity import Launches, assert_parity

COVERING = [
    Case("joint_lm", 2, 1, tensor_size=2),
]
SLOW: list[Case] = []
CASES = [*COVERING, *SLOW]
PARAMETERS = [
    pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else [], id="-".join(map(str, case)))
    for case in CASES
]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(CASES, SLOW, tmp_path_factory)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", PARAMETERS)
def test_a_mesh_computes_what_one_process_computes(launches: Launches, case: Case, optimizer: str) -> None:
    assert_parity(case, optimizer, launches.ranks(case, optimizer))
