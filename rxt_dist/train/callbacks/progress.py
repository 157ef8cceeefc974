"""A progress bar for the person who watches, on rank 0."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from rxt_dist.config import StageConfig
from rxt_dist.train.callbacks.base import Callback

logger = logging.getLogger(__name__)


class ProgressBar(Callback):
    """One bar a stage on a terminal; elsewhere (a log file) one line every tenth of a stage."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._terminal = sys.stderr.isatty()
        self._total = 0
        self._offset = 0
        self._reported = -1

    def on_stage_start(self, stage: StageConfig, step: int, stage_step: int) -> None:
        self._total = stage.steps
        self._offset = step - stage_step
        self._reported = -1
        if self._terminal:
            self._bar = tqdm(
                total=stage.steps, initial=stage_step, desc=stage.name, unit="step", file=sys.stderr
            )

    def on_log(self, record: Mapping[str, Any]) -> None:
        done = record["step"] - self._offset
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(_short(record))
            return
        tenth = 10 * done // self._total
        if tenth > self._reported:
            self._reported = tenth
            logger.info("%s %d/%d %s", record["stage"], done, self._total, _short(record))

    def on_stage_end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.on_stage_end()


def _short(record: Mapping[str, Any]) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in record.items() if name.endswith("loss"))
    return f"{losses} lr {record['lr']:.2e} {record['tokens_per_second']:,.0f} tokens/s"
