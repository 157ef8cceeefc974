"""Experts spread over ranks against autograd in one process: loss, gradients, norm, updates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.expert_cases import CLIP, OPTIMIZERS, STEPS, VARIANTS, Case, Plain, run_on_ranks
from helpers.launch import run_function

from rxt_dist.model.canonical import named_tensors

TOLERANCE = 1e-5
LAUNCH_SECONDS = 900.0
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
PARAMETERS = [
    pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else [], id="-".join(map(str, case)))
    for case in CASES
]

Results = Callable[[Case, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank found; all covering or all slow cases of a world size share a launch."""

    @cache
    def launch(world: int, slow: bool) -> Path:
        folder = tmp_path_factory.mktemp("experts")
        members = [(n, c) for n, c in enumerate(CASES) if c.world == world and (c in SLOW) == slow]
        assert run_function(world, run_on_ranks, folder, members, timeout=LAUNCH_SECONDS) == [0] * world
        return folder

    def found(case: Case, optimizer: str) -> list[dict[str, Any]]:
        folder = launch(case.world, case in SLOW)
        names = [f"{CASES.index(case)}-{optimizer}-{rank}.pt" for rank in range(case.world)]
        return [torch.load(folder / name, weights_only=True) for name in names]

    return found


def joined(shapes: dict[str, list[int]], fragments: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Whole tensors of the fragments of all ranks; every element must be there once."""
    found = {}
    for name, shape in shapes.items():
        numel = int(torch.Size(shape).numel())
        values, times = torch.full((numel,), torch.nan), torch.zeros(numel)
        for own in fragments:
            if f"{kind}.{name}" in own:
                whole, offset, part = own[f"{kind}.{name}"]
                assert whole == numel
                values[offset : offset + len(part)] = part
                times[offset : offset + len(part)] += 1
        if times.any():
            assert bool((times == 1).all()), (kind, name)
            found[name] = values
    return found


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = theirs.abs().max()
    return float((ours - theirs).abs().max() / scale) if scale else float(ours.abs().max())


def assert_gradients(ranks: list[dict[str, Any]], number: int, expected: dict[str, torch.Tensor]) -> None:
    for rank, found in enumerate(ranks):
        own = found["gradients"][number]
        assert expected.keys() <= own.keys()
        for name, (offset, values) in own.items():
            if name not in expected:  # frozen for now
                assert not values.any(), name
                continue
            theirs = expected[name]
            scale = theirs.abs().max()
            difference = (values - theirs[offset : offset + len(values)]).abs().max()
            assert difference <= TOLERANCE * scale, (rank, number, name, float(difference / scale))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", PARAMETERS)
def test_a_mesh_computes_what_one_process_computes(results: Results, case: Case, optimizer: str) -> None:
    ranks = results(case, optimizer)
    plain = Plain(case, optimizer)
    clipped = False
    for number in range(STEPS):
        loss, norm, gradients = plain.step(number)
        assert sum(found["loss"][number] for found in ranks) == pytest.approx(loss, rel=TOLERANCE)
        for found in ranks:
            assert found["norm"][number] == pytest.approx(norm, rel=TOLERANCE)
        assert_gradients(ranks, number, plain.canonical(gradients))
        clipped |= norm > CLIP
    assert clipped
    # Of logits, or with a selection bias of probabilities, which are smaller and as much more exact.
    moves = "bias_update_rate" in VARIANTS[case.variant]
    assert plain.margin >= (2e-5 if moves else 1e-4), plain.margin
    assert plain.unused == ("unused" in case.variant)

    shapes, fragments = ranks[0]["shapes"], [found["fragments"] for found in ranks]
    weights = joined(shapes, fragments, "weight")
    expected = plain.canonical({name: p.detach() for name, p in named_tensors(plain.model).items()})
    assert weights.keys() == expected.keys()
    errors = {name: error(values, expected[name]) for name, values in weights.items()}
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])
    for found in ranks:
        for name, buffer in found["buffers"].items():
            assert torch.equal(buffer, plain.model.get_buffer(name)), name
    shares = joined({one.name: [len(one.shares)] for one in plain.routers}, fragments, "load_share")
    assert bool(shares) == ("switch" in case.variant)
    for one in plain.routers if shares else []:
        torch.testing.assert_close(shares[one.name], torch.tensor(one.shares))
    if optimizer == "AdamW":
        moments = joined(shapes, fragments, "exp_avg")
        states = {
            name: plain.optimizers[start].state[parameter]["exp_avg"]
            for start, group in plain.groups().items()
            if start in plain.optimizers
            for name, parameter in group.items()
        }
        wanted = plain.canonical(states)
        assert moments.keys() == wanted.keys()
        assert max(error(moments[name], values) for name, values in wanted.items()) <= TOLERANCE
