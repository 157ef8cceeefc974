"""The Prometheus metrics of a training process.

Units are base units (seconds, tokens), counters end in ``_total``. Labels that tell processes apart
(run, node, local rank) are labels of the scrape target, not of each metric. Values that are the same
on all ranks of a run (step, tokens, losses, checkpoints) are global values, so a query takes their
maximum over ranks, never their sum.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)

from rxt_dist import __version__

_STEP_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_WAIT_BUCKETS = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)
_SAVE_BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 1800.0)
_MEMORY_GAUGES = {
    "memory_rms": "Root mean square of the short-term memories",
    "memory_between_share": "Share of the memories' energy that differs between conversations",
    "memory_slot_cosine": "Mean cosine between two slots of a memory",
    "write_gate_mean": "Mean of the write gate, the share of a memory that a write replaces",
    "write_gate_std": "Standard deviation of the write gate",
    "reset_share": "Share of interactions that began a conversation",
}
_EXPERT_GAUGES = {
    "expert_load_entropy": "Entropy of the experts' shares of tokens over its maximum, mean of the layers",
    "expert_load_max": "Tokens of the busiest expert over the mean, worst layer",
    "dead_experts": "Experts without a token in the last logged step, all layers together",
    "expert_bias_span": "Largest less smallest selection bias of the experts, worst layer",
}
_REPORTED_PACKAGES = ("torch", "deepspeed", "megatron-core")


class TrainState(StrEnum):
    """What a training process is doing; the states of ``rxt_train_state``."""

    INIT = "init"
    TRAINING = "training"
    CHECKPOINTING = "checkpointing"
    EVALUATING = "evaluating"
    STOPPED = "stopped"


class TrainMetrics:
    """All metrics of one training process, in a registry of its own.

    Updates are in-memory only (microseconds, no device synchronisation): pass numbers that are already
    on the host. The methods may be called from any thread.

    Attributes:
        registry: what the exporter publishes; holds nothing but ``rxt_`` metrics.
    """

    def __init__(self) -> None:
        # The client only offers this switch for the whole process; a second series for the creation
        # time of each counter and histogram is of no use to any query here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._add_training_metrics()
        self._add_data_and_checkpoint_metrics()
        self._add_statistics()
        self._run_info = Info("rxt_run", "Configuration of the run", registry=self.registry)
        build_info = Info("rxt_build", "Versions of the program and its engines", registry=self.registry)
        build_info.info(_build_facts())

    def _add_training_metrics(self) -> None:
        registry = self.registry
        self._step = Gauge("rxt_train_step", "Optimizer steps finished, over all stages", registry=registry)
        self._tokens = Counter(
            "rxt_train_tokens",
            "Tokens trained on since the process started, over all ranks",
            registry=registry,
        )
        self._loss = Gauge(
            "rxt_train_loss",
            "Loss of the last logged step, per supervised token",
            ["component"],
            registry=registry,
        )
        self._grad_norm = Gauge("rxt_train_grad_norm", "Gradient norm before clipping", registry=registry)
        self._learning_rate = Gauge("rxt_train_learning_rate", "Learning rate used", registry=registry)
        self._step_seconds = Histogram(
            "rxt_train_step_seconds",
            "Wall time of an optimizer step, waiting for data included",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._tokens_per_second = Gauge(
            "rxt_train_tokens_per_second",
            "Tokens of the last step over all ranks / its wall time",
            registry=registry,
        )
        self._last_step_time = Gauge(
            "rxt_train_last_step_timestamp_seconds",
            "Unix time when the last step finished, or when training (re)started if that is later",
            registry=registry,
        )
        self._state = Enum(
            "rxt_train_state",
            "What the process is doing",
            states=[state.value for state in TrainState],
            registry=registry,
        )

    def _add_data_and_checkpoint_metrics(self) -> None:
        registry = self.registry
        self._data_wait = Histogram(
            "rxt_data_wait_seconds",
            "Time a step waited for its data",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self._corrupt_blocks = Gauge(
            "rxt_data_corrupt_blocks",
            "Damaged blocks of the stage's data that were left out, over all ranks",
            registry=registry,
        )
        self._save_seconds = Histogram(
            "rxt_checkpoint_save_seconds",
            "Wall time of a checkpoint",
            buckets=_SAVE_BUCKETS,
            registry=registry,
        )
        self._checkpoint_step = Gauge(
            "rxt_checkpoint_last_step", "Step of the newest complete checkpoint", registry=registry
        )
        self._checkpoint_interval = Gauge(
            "rxt_checkpoint_interval_steps",
            "Steps between two checkpoints; 0 when they are only made at the end of a stage",
            registry=registry,
        )
        self._checkpoint_time = Gauge(
            "rxt_checkpoint_last_success_timestamp_seconds",
            "Unix time of the newest checkpoint made by this process; 0 before the first",
            registry=registry,
        )

    def _add_statistics(self) -> None:
        described = {name: f"{text}; NaN outside the memory stages" for name, text in _MEMORY_GAUGES.items()}
        described |= {name: f"{text}; NaN where no experts run" for name, text in _EXPERT_GAUGES.items()}
        self._statistics = {
            name: Gauge(f"rxt_{name}", text, registry=self.registry) for name, text in described.items()
        }
        self.clear_losses()

    def set_state(self, state: TrainState) -> None:
        """Publish what the process does now; entering ``TRAINING`` restarts the clock of stalled training."""
        self._state.state(state.value)
        if state is TrainState.TRAINING:
            self._last_step_time.set(time.time())

    def set_run_info(self, facts: Mapping[str, str | int]) -> None:
        """Publish short facts of the run as labels of ``rxt_run_info``: no secrets, no paths, no texts."""
        self._run_info.info({name: str(value) for name, value in facts.items()})

    def record_start(self, step: int, checkpoint_interval: int | None) -> None:
        """Publish where training starts: the step of the loaded checkpoint (0 for a new run).

        Args:
            step: optimizer steps done before this process started.
            checkpoint_interval: steps between checkpoints, None if only stages' ends are saved.
        """
        self._step.set(step)
        self._checkpoint_step.set(step)
        self._checkpoint_interval.set(checkpoint_interval or 0)

    def record_step(self, step: int, *, tokens: int, step_seconds: float, data_wait_seconds: float) -> None:
        """Publish a finished optimizer step.

        Args:
            step: optimizer steps finished, all stages together.
            tokens: real tokens of the step over all ranks.
            step_seconds: wall time of the step, waiting for data included.
            data_wait_seconds: the part of it that waited for data on this rank.
        """
        self._step.set(step)
        self._tokens.inc(tokens)
        self._step_seconds.observe(step_seconds)
        self._data_wait.observe(data_wait_seconds)
        if step_seconds > 0:
            self._tokens_per_second.set(tokens / step_seconds)
        self._last_step_time.set(time.time())

    def record_optimization(
        self, *, losses: Mapping[str, float], grad_norm: float, learning_rate: float
    ) -> None:
        """Publish the figures of a logged step.

        Args:
            losses: component name -> loss per supervised token, averaged over the global step.
            grad_norm: global gradient norm before clipping.
            learning_rate: learning rate that the step used.
        """
        for component, loss in losses.items():
            self._loss.labels(component).set(loss)
        self._grad_norm.set(grad_norm)
        self._learning_rate.set(learning_rate)

    def record_statistics(self, statistics: Mapping[str, float | None]) -> None:
        """Publish the statistics of memory and experts of a logged step, by name; None: not known."""
        for name, gauge in self._statistics.items():
            value = statistics.get(name)
            gauge.set(math.nan if value is None else value)

    def record_corrupt_blocks(self, blocks: int) -> None:
        """Publish how many damaged blocks were left out so far in the stage."""
        self._corrupt_blocks.set(blocks)

    def clear_losses(self) -> None:
        """Forget losses and statistics, at the start of a stage: another one may have other ones."""
        self._loss.clear()
        self.record_statistics({})

    def record_checkpoint(self, step: int, seconds: float) -> None:
        """Publish a complete checkpoint of ``step`` that took ``seconds`` of wall time."""
        self._checkpoint_step.set(step)
        self._save_seconds.observe(seconds)
        self._checkpoint_time.set(time.time())


def _build_facts() -> dict[str, str]:
    facts = {"version": __version__, "python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            facts[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return facts
