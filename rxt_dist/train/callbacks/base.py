"""The hooks of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rxt_dist.config import StageConfig
from rxt_dist.observe.metrics import TrainState


class Callback:
    """Base of everything that listens; every hook does nothing by default.

    Hooks run on every rank at the same points of the program. None of them may start a collective
    operation or wait for the device: all numbers they get are on the host already.
    """

    def on_state(self, state: TrainState) -> None:
        """The process now does something else."""

    def on_stage_start(self, stage: StageConfig, step: int, stage_step: int) -> None:
        """A stage begins or is resumed at ``stage_step`` of its steps, ``step`` of the run."""

    def on_step(self, step: int, tokens: int, seconds: float, data_wait_seconds: float) -> None:
        """An optimizer step is queued: its number, real tokens of all ranks, host wall time."""

    def on_log(self, record: Mapping[str, Any]) -> None:
        """A logged step; the record is what ``metrics.jsonl`` holds."""

    def on_checkpoint(self, step: int, seconds: float) -> None:
        """A checkpoint is complete."""

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done; the record is what ``eval.jsonl`` holds."""

    def on_stage_end(self) -> None:
        """All steps of the stage are done."""

    def close(self) -> None:
        """The run ends, normally or by an exception."""


class CallbackList(Callback):
    """Hands every hook to each of the callbacks, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def on_state(self, state: TrainState) -> None:
        for callback in self._callbacks:
            callback.on_state(state)

    def on_stage_start(self, stage: StageConfig, step: int, stage_step: int) -> None:
        for callback in self._callbacks:
            callback.on_stage_start(stage, step, stage_step)

    def on_step(self, step: int, tokens: int, seconds: float, data_wait_seconds: float) -> None:
        for callback in self._callbacks:
            callback.on_step(step, tokens, seconds, data_wait_seconds)

    def on_log(self, record: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_log(record)

    def on_checkpoint(self, step: int, seconds: float) -> None:
        for callback in self._callbacks:
            callback.on_checkpoint(step, seconds)

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_evaluation(record)

    def on_stage_end(self) -> None:
        for callback in self._callbacks:
            callback.on_stage_end()

    def close(self) -> None:
        for callback in self._callbacks:
            callback.close()
