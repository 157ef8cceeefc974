"""Ranks that share tensors and divide the tokens between products, against autograd in one process."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.expert_cases import OPTIMIZERS, Case
from helpers.parity import Results, assert_one_process, parameters_of, results_of

Sliced = partial(Case, sequence=True)
LAYER_NORM = (("model.norm", "layer"), ("model.decoder.head_norm", "layer"))
DENSE = (("model.decoder.stateless_layers", "[dense]"), ("model.decoder.dense_layer_dim", 64))
# With 8 units and an accumulation of 8 / dp a pass has the tokens of one piece or interaction, as few as 1.
COVERING = [
    Sliced("joint_lm", 2, 1, zero=2, accumulation=2, tensor_size=2, heads="one kv head, gated"),
    Sliced(
        "smat", 2, 2, accumulation=8, tensor_size=2, variant="global bias, two shared", settings=LAYER_NORM
    ),
    Sliced("context_sft", 2, 1, zero=2, tensor_size=2, heads="reverse"),
    Sliced("smat, decoder joins", 4, 2, zero=2, tensor_size=2, recompute="interaction", variant="switch, z"),
    Sliced("joint_lm", 4, 4, accumulation=8, tensor_size=4, variant="switch, z, bias, top 1"),
]
SPECIAL = [
    Sliced("smat", 2, 2, zero=2, variant="no bias", tensor_size=2, heads="reverse", recompute="interaction"),
    Sliced("smat, frozen decoder", 2, 1, tensor_size=2),
    Sliced("smat, frozen decoder", 4, 2, zero=2, tensor_size=4, accumulation=8),
    Sliced("smat, decoder joins", 2, 1, accumulation=8, tensor_size=2, variant="global bias, two shared"),
    Sliced("smat, always fresh", 2, 1, tensor_size=2, heads="one kv head, gated"),
    Sliced("joint_lm", 2, 1, tensor_size=2, variant="top 1, unused expert"),
    Sliced("joint_lm", 4, 4, zero=2, tensor_size=2, variant="eight experts", accumulation=4),
    Sliced("smat", 4, 2, zero=2, accumulation=8, tensor_size=4, heads="reverse"),
    Sliced("smat", 4, 4, tensor_size=4, heads="one kv head, gated", variant="global bias, two shared"),
    Sliced("context_sft", 4, 2, accumulation=8, tensor_size=4, heads="one kv head, gated"),
    Sliced("context_sft", 4, 4, zero=2, tensor_size=2, variant="switch, z, bias, top 1"),
    Sliced("joint_lm", 2, 1, accumulation=8, tensor_size=2, settings=(("model.norm", "layer"),)),
    Sliced("joint_lm", 2, 2, 2, tensor_size=2, settings=(("zero.offload_optimizer", "cpu"),)),
    Sliced("joint_lm", 4, 1, accumulation=8, tensor_size=4, settings=DENSE),
]
MATRIX = [
    Sliced(stage, world, size, zero, accumulation, tensor_size=2)
    for stage in ("joint_lm", "context_sft", "memory_attention", "smat")
    for world in (2, 4)
    for size in (1, 2, 4)
    for zero, accumulation in ((1, 4), (2, 1))
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
