"""The learning rate of every step."""

from __future__ import annotations

import math

import pytest

from rxt_dist.config import OptimizerConfig
from rxt_dist.train.schedule import learning_rate

PEAK = 0.02


def rates(steps: int, **settings: object) -> list[float]:
    optimizer = OptimizerConfig.model_validate({"lr": PEAK, **settings})
    return [learning_rate(optimizer, step, steps) for step in range(steps)]


def test_the_warm_up_is_linear_and_its_first_step_moves() -> None:
    assert rates(8, warmup_steps=4, schedule="constant") == pytest.approx(
        [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK, PEAK, PEAK, PEAK]
    )


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(3, schedule="constant") == [PEAK] * 3
    assert rates(3)[0] == PEAK


def test_the_cosine_falls_from_the_peak_to_its_floor() -> None:
    found = rates(6, warmup_steps=2)
    assert found[:2] == pytest.approx([PEAK / 2, PEAK])
    # progress 0, 1/4, 1/2, 3/4 after the warm-up
    root = math.sqrt(0.5)
    assert found[2:] == pytest.approx([PEAK, PEAK * (1 + root) / 2, PEAK / 2, PEAK * (1 - root) / 2])
    with_floor = rates(6, warmup_steps=2, min_lr_ratio=0.1)
    assert with_floor[2:] == pytest.approx([0.1 * PEAK + 0.9 * value for value in found[2:]])
    assert with_floor[:2] == found[:2]


def test_the_cosine_is_symmetric_and_never_rises() -> None:
    found = rates(101)
    assert found == sorted(found, reverse=True)
    assert found[50] + found[51] == pytest.approx(PEAK)
    assert 0 < found[-1] < 0.001 * PEAK


def test_steps_beyond_the_stage_stay_at_the_floor() -> None:
    optimizer = OptimizerConfig(lr=PEAK, min_lr_ratio=0.25)
    assert learning_rate(optimizer, 10, 10) == pytest.approx(PEAK / 4)
    assert learning_rate(optimizer, 1000, 10) == pytest.approx(PEAK / 4)


def test_a_stage_that_is_all_warm_up() -> None:
    assert rates(2, warmup_steps=2) == [PEAK / 2, PEAK]


def test_parameters_that_join_later_have_a_warm_up_under_the_curve_of_the_others() -> None:
    optimizer = OptimizerConfig(lr=PEAK, warmup_steps=2, min_lr_ratio=0.1)
    whole = rates(10, warmup_steps=2, min_lr_ratio=0.1)
    found = [learning_rate(optimizer, step, 10, 5) for step in range(10)]
    assert found == pytest.approx([0.0] * 5 + [whole[5] / 2, *whole[6:]])
    # Within the warm-up of the stage, the curve is at its peak.
    early = [learning_rate(optimizer, step, 10, 1) for step in range(10)]
    assert early == pytest.approx([0.0, PEAK / 2, *whole[2:]])
    without = OptimizerConfig(lr=PEAK, schedule="constant")
    assert [learning_rate(without, step, 4, 2) for step in range(4)] == [0.0, 0.0, PEAK, PEAK]
