"""Publishes the run's figures to Prometheus; whatever fails here never stops training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.observe.exporter import start_exporter
from rxt_dist.observe.metrics import TrainMetrics, TrainState
from rxt_dist.parallel.bootstrap import World
from rxt_dist.train.callbacks.base import Callback

logger = logging.getLogger(__name__)


class PrometheusCallback(Callback):
    """Feeds :class:`TrainMetrics` and serves it on this rank's port."""

    def __init__(self, config: RunConfig, world: World, step: int) -> None:
        self._metrics = TrainMetrics()
        self._metrics.record_start(step, config.checkpoint.every_steps)
        self._metrics.set_run_info(
            {
                "model": config.model.name,
                "world_size": world.size,
                "precision": config.precision,
                "zero_stage": config.zero.stage,
                "seed": config.seed,
            }
        )
        exporter = config.metrics.prometheus
        self._exporter = start_exporter(self._metrics, exporter.host, exporter.base_port, world.local_rank)
        if self._exporter is not None:
            logger.info("metrics at %s", self._exporter.url)

    def on_state(self, state: TrainState) -> None:
        self._metrics.set_state(state)

    def on_stage_start(self, stage: StageConfig, step: int, stage_step: int) -> None:
        self._metrics.clear_losses()

    def on_step(self, step: int, tokens: int, seconds: float, data_wait_seconds: float) -> None:
        self._metrics.record_step(
            step, tokens=tokens, step_seconds=seconds, data_wait_seconds=data_wait_seconds
        )

    def on_log(self, record: Mapping[str, Any]) -> None:
        losses = {name: value for name, value in record.items() if name.endswith("loss")}
        self._metrics.record_optimization(
            losses=losses, grad_norm=record["grad_norm"], learning_rate=record["lr"]
        )
        self._metrics.record_statistics(record)
        self._metrics.record_corrupt_blocks(record["corrupt_blocks"])

    def on_checkpoint(self, step: int, seconds: float) -> None:
        self._metrics.record_checkpoint(step, seconds)

    def close(self) -> None:
        self._metrics.set_state(TrainState.STOPPED)
        if self._exporter is not None:
            self._exporter.close()
