"""Tensors shared by ranks, alone and with spread experts, against autograd in one process."""

from __future__ import annotations

import pytest
from helpers.expert_cases import OPTIMIZERS, Case
from helpers.parity import Results, assert_one_process, parameters_of, results_of

COVERING = [
    Case("joint_lm", 2, 2, zero=2, tensor_size=2, heads="one kv head, gated"),
    Case("smat", 2, 1, accumulation=2, variant="global bias, two shared", tensor_size=2),
    Case("memory_attention", 2, 1, zero=2, tensor_size=2, heads="reverse"),
    Case("smat", 4, 2, zero=2, recompute="interaction", tensor_size=2),
    Case("joint_lm", 4, 4, tensor_size=4, variant="switch, z, bias, top 1"),
]
SPECIAL = [
    Case("smat", 2, 2, zero=2, variant="no bias", tensor_size=2, heads="reverse", recompute="interaction"),
    Case("smat, frozen decoder", 2, 1, tensor_size=2),
    Case("smat, decoder joins", 2, 2, zero=2, tensor_size=2),
    Case("smat, always fresh", 2, 1, tensor_size=2, heads="one kv head, gated"),
    Case("joint_lm", 2, 1, tensor_size=2, variant="top 1, unused expert"),
    Case("joint_lm", 4, 4, zero=2, tensor_size=2, variant="eight experts"),
    Case("joint_lm", 4, 4, tensor_size=2, variant="top 1, unused expert"),
    Case("smat", 4, 2, zero=2, tensor_size=4, heads="reverse"),
    Case("smat", 4, 4, tensor_size=4, heads="one kv head, gated", variant="global bias, two shared"),
    Case("smat", 4, 1, zero=2, tensor_size=4),
    Case("memory_attention", 4, 1, accumulation=2, tensor_size=4),
    Case("smat", 2, 1, tensor_size=2, variant="switch, z"),
    Case("joint_lm", 2, 2, 2, tensor_size=2, settings=(("zero.offload_optimizer", "cpu"),)),
    Case("smat, decoder joins", 4, 2, zero=2, tensor_size=2, variant="selection bias"),
    Case("context_sft", 2, 1, tensor_size=2),
    Case("context_sft", 4, 2, zero=2, tensor_size=2),
]
MATRIX = [
    Case(stage, world, size, zero, accumulation, tensor_size=2)
    for stage in ("joint_lm", "smat", "memory_attention")
    for world in (2, 4)
    for size in (1, 2, 4)
    for zero in (1, 2)
    for accumulation in (1, 2)
    if size <= world
]
SLOW = [*SPECIAL, *MATRIX]
CASES = [*COVERING, *SLOW]
MEMBERS = [(case, optimizer) for case in CASES for optimizer in (OPTIMIZERS if case in SLOW else ("AdamW",))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(MEMBERS, SLOW, tmp_path_factory)


@pytest.mark.parametrize(("case", "optimizer"), parameters_of(MEMBERS, SLOW))
def test_a_mesh_computes_what_one_process_computes(results: Results, case: Case, optimizer: str) -> None:
    assert_one_process(case, optimizer, results(case, optimizer))
