from __future__ import annotations

import math
import time

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rxt_dist.observe.metrics import TrainMetrics, TrainState


def samples(metrics: TrainMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: TrainMetrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def test_every_series_has_our_prefix_and_none_is_a_creation_time() -> None:
    names = {name for name, _ in samples(TrainMetrics())}
    assert names
    assert all(name.startswith("rxt_") for name in names)
    assert not [name for name in names if name.endswith("_created")]


def test_two_processes_worth_of_metrics_do_not_share_a_registry() -> None:
    first, second = TrainMetrics(), TrainMetrics()
    first.record_start(7, checkpoint_interval=None)
    assert value(first, "rxt_train_step") == 7
    assert value(second, "rxt_train_step") == 0


def test_a_step_is_published() -> None:
    metrics = TrainMetrics()
    before = time.time()
    metrics.record_step(7, tokens=1000, step_seconds=0.25, data_wait_seconds=0.02)
    metrics.record_step(8, tokens=500, step_seconds=0.5, data_wait_seconds=0.0)
    assert value(metrics, "rxt_train_step") == 8
    assert value(metrics, "rxt_train_tokens_total") == 1500
    assert value(metrics, "rxt_train_tokens_per_second") == 1000
    assert value(metrics, "rxt_train_step_seconds_count") == 2
    assert value(metrics, "rxt_train_step_seconds_sum") == pytest.approx(0.75)
    assert value(metrics, "rxt_data_wait_seconds_sum") == pytest.approx(0.02)
    assert before <= value(metrics, "rxt_train_last_step_timestamp_seconds") <= time.time()


def test_a_step_without_duration_keeps_the_last_speed() -> None:
    metrics = TrainMetrics()
    metrics.record_step(1, tokens=100, step_seconds=0.5, data_wait_seconds=0.0)
    metrics.record_step(2, tokens=100, step_seconds=0.0, data_wait_seconds=0.0)
    assert value(metrics, "rxt_train_tokens_per_second") == 200


def test_optimization_figures_and_non_finite_ones() -> None:
    metrics = TrainMetrics()
    metrics.record_optimization(
        losses={"masked": 2.5, "next": math.nan}, grad_norm=math.inf, learning_rate=1e-4
    )
    assert value(metrics, "rxt_train_loss", component="masked") == 2.5
    assert math.isnan(value(metrics, "rxt_train_loss", component="next"))
    assert value(metrics, "rxt_train_grad_norm") == math.inf
    assert value(metrics, "rxt_train_learning_rate") == 1e-4


def test_components_of_an_earlier_stage_disappear() -> None:
    metrics = TrainMetrics()
    metrics.record_optimization(losses={"masked": 2.5}, grad_norm=1.0, learning_rate=1e-4)
    metrics.clear_losses()
    assert not [name for name, _ in samples(metrics) if name == "rxt_train_loss"]


@pytest.mark.parametrize("state", list(TrainState))
def test_exactly_one_state_is_set(state: TrainState) -> None:
    metrics = TrainMetrics()
    metrics.set_state(state)
    states = {
        other.value: value(metrics, "rxt_train_state", rxt_train_state=other.value) for other in TrainState
    }
    assert states == {other.value: float(other is state) for other in TrainState}


def test_entering_training_restarts_the_stall_clock_and_other_states_do_not() -> None:
    metrics = TrainMetrics()
    metrics.set_state(TrainState.EVALUATING)
    assert value(metrics, "rxt_train_last_step_timestamp_seconds") == 0
    before = time.time()
    metrics.set_state(TrainState.TRAINING)
    assert value(metrics, "rxt_train_last_step_timestamp_seconds") >= before


def test_start_of_a_resumed_run_and_checkpoints() -> None:
    metrics = TrainMetrics()
    metrics.record_start(400, checkpoint_interval=50)
    assert value(metrics, "rxt_train_step") == 400
    assert value(metrics, "rxt_checkpoint_last_step") == 400
    assert value(metrics, "rxt_checkpoint_interval_steps") == 50
    assert value(metrics, "rxt_checkpoint_last_success_timestamp_seconds") == 0
    before = time.time()
    metrics.record_checkpoint(450, seconds=3.0)
    assert value(metrics, "rxt_checkpoint_last_step") == 450
    assert value(metrics, "rxt_checkpoint_save_seconds_sum") == 3.0
    assert value(metrics, "rxt_checkpoint_last_success_timestamp_seconds") >= before


def test_no_interval_is_zero() -> None:
    metrics = TrainMetrics()
    metrics.record_start(0, checkpoint_interval=None)
    assert value(metrics, "rxt_checkpoint_interval_steps") == 0


def test_run_and_build_info() -> None:
    metrics = TrainMetrics()
    metrics.set_run_info({"precision": "bf16", "data_parallel_size": 4})
    assert value(metrics, "rxt_run_info", precision="bf16", data_parallel_size="4") == 1
    (build_labels,) = [dict(labels) for name, labels in samples(metrics) if name == "rxt_build_info"]
    assert {"version", "python", "torch"} <= build_labels.keys()


def test_a_step_update_costs_less_than_200_microseconds() -> None:
    metrics = TrainMetrics()
    losses = {"masked": 1.0, "next": 2.0, "balance": 3.0}
    seconds = []
    for step in range(500):
        start = time.perf_counter()
        metrics.record_step(step, tokens=4096, step_seconds=0.2, data_wait_seconds=0.001)
        metrics.record_optimization(losses=losses, grad_norm=1.0, learning_rate=1e-4)
        seconds.append(time.perf_counter() - start)
    # The median: a busy machine preempts single updates, which says nothing about their cost.
    assert sorted(seconds)[len(seconds) // 2] < 200e-6


def test_statistics_of_the_memory_are_published_and_forgotten() -> None:
    metrics = TrainMetrics()
    gauges = ("rxt_expert_load_entropy", "rxt_expert_load_max", "rxt_dead_experts", "rxt_expert_bias_span",
              "rxt_memory_rms", "rxt_memory_between_share", "rxt_memory_slot_cosine", "rxt_write_gate_mean",
              "rxt_write_gate_std", "rxt_reset_share")  # fmt: skip
    assert all(math.isnan(value(metrics, name)) for name in gauges)
    numbers: dict[str, float | None] = {
        name.removeprefix("rxt_"): number / 8 for number, name in enumerate(gauges)
    }
    metrics.record_statistics(numbers | {"write_gate_std": None})
    for number, name in enumerate(gauges):
        found = value(metrics, name)
        assert math.isnan(found) if name == "rxt_write_gate_std" else found == number / 8
    metrics.clear_losses()
    assert all(math.isnan(value(metrics, name)) for name in gauges)


def test_damaged_blocks_are_published() -> None:
    metrics = TrainMetrics()
    assert value(metrics, "rxt_data_corrupt_blocks") == 0
    metrics.record_corrupt_blocks(3)
    assert value(metrics, "rxt_data_corrupt_blocks") == 3
