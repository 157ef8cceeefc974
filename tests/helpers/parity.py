"""What engines on many ranks found, compared with autograd in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.expert_cases import CLIP, STEPS, VARIANTS, Case, run_on_ranks
from helpers.launch import run_function
from helpers.plain_steps import Plain

from rxt_dist.model.canonical import named_tensors

TOLERANCE = 1e-5
LAUNCH_SECONDS = 900.0

Results = Callable[[Case, str], list[dict[str, Any]]]


def parameters_of(members: Sequence[tuple[Case, str]], slow: list[Case]) -> list[Any]:
    """Cases with their optimizers as parameters of a test, those of ``slow`` marked."""
    return [
        pytest.param(
            case,
            optimizer,
            marks=[pytest.mark.slow] if case in slow else [],
            id="-".join(map(str, (*case, optimizer))),
        )
        for case, optimizer in members
    ]


def results_of(
    members: list[tuple[Case, str]], slow: list[Case], tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """What every rank found in a case trained with an optimizer; all quick or all slow ones of a world size
    share a launch."""

    @cache
    def launch(world: int, is_slow: bool) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        own = [
            (number, case, optimizer)
            for number, (case, optimizer) in enumerate(members)
            if case.world == world and (case in slow) == is_slow
        ]
        assert run_function(world, run_on_ranks, folder, own, timeout=LAUNCH_SECONDS) == [0] * world
        return folder

    def found(case: Case, optimizer: str) -> list[dict[str, Any]]:
        folder = launch(case.world, case in slow)
        names = [f"{members.index((case, optimizer))}-{rank}.pt" for rank in range(case.world)]
        return [torch.load(folder / name, weights_only=True) for name in names]

    return found


def joined(shapes: dict[str, list[int]], fragments: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Whole tensors of the fragments of all ranks; every element must be there once."""
    found = {}
    for name, shape in shapes.items():
        values, times = torch.full(shape, torch.nan), torch.zeros(shape)
        for own in fragments:
            whole, boxes = own.get(f"{kind}.{name}", (shape, []))
            assert list(whole) == shape
            for starts, part in boxes:
                box_of(values, starts, part.shape).copy_(part)
                box_of(times, starts, part.shape).add_(1)
        if times.any():
            assert bool((times == 1).all()), (kind, name)
            found[name] = values
    return found


def box_of(whole: torch.Tensor, starts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """A view of a part of ``whole``."""
    return whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = theirs.abs().max()
    return float((ours - theirs).abs().max() / scale) if scale else float(ours.abs().max())


def assert_gradients(ranks: list[dict[str, Any]], number: int, expected: dict[str, torch.Tensor]) -> None:
    for rank, found in enumerate(ranks):
        own = found["gradients"][number]
        assert expected.keys() <= own.keys()
        for name, boxes in own.items():
            for starts, values in boxes:
                if name not in expected:  # frozen for now
                    assert not values.any(), name
                    continue
                theirs = expected[name]
                scale = theirs.abs().max()
                difference = (values - box_of(theirs, starts, values.shape)).abs().max()
                assert difference <= TOLERANCE * scale, (rank, number, name, float(difference / scale))


def assert_one_process(case: Case, optimizer: str, ranks: list[dict[str, Any]]) -> None:
    """Loss, gradients before clipping, norm, weights and first moments are those of autograd in a process."""
    plain = Plain(case, optimizer)
    clipped = False
    for number in range(STEPS):
        loss, norm, gradients = plain.step(number)
        shares = [found["loss"][number] for found in ranks]
        assert sum(shares[:: case.tensor_size]) == pytest.approx(loss, rel=TOLERANCE)
        for first in range(0, case.world, case.tensor_size):
            assert len(set(shares[first : first + case.tensor_size])) == 1
        for found in ranks:
            assert found["norm"][number] == pytest.approx(norm, rel=TOLERANCE)
        assert_gradients(ranks, number, plain.canonical(gradients))
        clipped |= norm > CLIP
    assert clipped
    # Of logits, or with a selection bias of probabilities, which are smaller and as much more exact.
    moves = "bias_update_rate" in VARIANTS[case.variant]
    assert plain.margin >= (2e-5 if moves else 1e-4), plain.margin
    assert plain.unused in (None, "unused" in case.variant)

    shapes, fragments = ranks[0]["shapes"], [found["fragments"] for found in ranks]
    weights = joined(shapes, fragments, "weight")
    expected = plain.canonical({name: p.detach() for name, p in named_tensors(plain.model).items()})
    assert weights.keys() == expected.keys()
    errors = {name: error(values, expected[name]) for name, values in weights.items()}
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])
    for found in ranks:
        for name, buffer in found["buffers"].items():
            assert torch.equal(buffer, plain.model.get_buffer(name)), name
    loads = joined({one.name: [len(one.shares)] for one in plain.routers}, fragments, "load_share")
    assert bool(loads) == ("switch" in case.variant)
    for one in plain.routers if loads else []:
        torch.testing.assert_close(loads[one.name], torch.tensor(one.shares))
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
