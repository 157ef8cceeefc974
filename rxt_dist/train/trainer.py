"""The training loop: stages in order, each from the weights of the one before it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from rxt_dist.checkpoint import CheckpointReader, TrainerState, save_checkpoint
from rxt_dist.config import RunConfig, StageConfig, stage_optimizer
from rxt_dist.data.store import DatasetStore
from rxt_dist.errors import TrainingError
from rxt_dist.interchange.native import NativeReader
from rxt_dist.model import RxTModel
from rxt_dist.model.model import empty_model
from rxt_dist.observe.metrics import TrainState
from rxt_dist.parallel.bootstrap import World
from rxt_dist.parallel.collectives import sum_over_ranks
from rxt_dist.stages import Pieces, build_stage, open_pieces
from rxt_dist.train.build import build_engine
from rxt_dist.train.callbacks import Callback
from rxt_dist.train.engine import StageEngine
from rxt_dist.train.evaluation import evaluate_stage
from rxt_dist.train.feed import DataState, Feed, Step, next_stage_state, open_feed, resumed_data_state
from rxt_dist.train.meter import Meter
from rxt_dist.train.run_dir import has_evaluation, text_files
from rxt_dist.train.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where the run stands between two optimizer steps."""

    step: int = 0
    stage_index: int = 0
    stage_step: int = 0
    tokens: int = 0
    data_state: DataState | None = None


class Trainer:
    """Runs the stages of a resolved configuration on all ranks of the process group.

    ``weights`` is what to start from or None for fresh weights; with ``resume`` it is a checkpoint of this
    run, whose optimizer, data position and counters are taken over too.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        store: DatasetStore,
        tokenizer: Tokenizer,
        callbacks: Callback,
        *,
        weights: CheckpointReader | NativeReader | None,
        resume: bool,
    ) -> None:
        self._config = config
        self._world = world
        self._store = store
        self._tokenizer = tokenizer
        self._callbacks = callbacks
        self._weights = weights
        self._resumed = weights if resume and isinstance(weights, CheckpointReader) else None
        self._foreign_weights = not resume
        """Whether ``weights`` may lack tensors of this model: they come from another run."""
        self._fingerprint = ""
        self._position = Position()
        if self._resumed is not None:
            state = self._resumed.state
            self._position = Position(
                state.step, state.stage_index, state.stage_step, state.tokens, state.data_state
            )

    def run(self) -> None:
        """Train every stage that is not finished; returns when the last one is evaluated."""
        for index in range(self._position.stage_index, len(self._config.stages)):
            if index > self._position.stage_index:
                state = next_stage_state(self._position.data_state)
                self._position = replace(self._position, stage_index=index, stage_step=0, data_state=state)
            self._run_stage(self._config.stages[index])

    def _run_stage(self, stage: StageConfig) -> None:
        finished = self._position.stage_step == stage.steps
        if finished and self._is_evaluated(stage):
            logger.info("stage %d (%s) is finished already", self._position.stage_index, stage.name)
            return
        config, position = self._config, self._position
        source = open_pieces(config, stage, "train", self._store)
        held_out = open_pieces(config, stage, "val", self._store)
        self._store.release()
        resumed = self._resume_inside(stage, source.fingerprint)
        self._fingerprint = source.fingerprint
        engine = self._build_engine(stage, resumed)
        try:
            if not finished:
                self._callbacks.on_stage_start(stage, position.step, position.stage_step)
                self._callbacks.on_state(TrainState.TRAINING)
                index, state = position.stage_index, self._position.data_state
                with open_feed(config, stage, index, source, self._world, state) as feed:
                    if resumed is not None:
                        feed.restore(resumed)
                    self._train(engine, stage, feed)
                self._callbacks.on_stage_end()
            self._evaluate(engine, stage, held_out)
        finally:
            engine.close()

    def _resume_inside(self, stage: StageConfig, fingerprint: str) -> CheckpointReader | None:
        """The checkpoint to take optimizer and lanes from, if the run is resumed inside this stage."""
        resumed, self._resumed = self._resumed, None
        if resumed is None or resumed.state.stage_index != self._position.stage_index:
            return None
        state = resumed_data_state(
            resumed.state, fingerprint, accept_changed=self._config.data.accept_changed
        )
        self._position = replace(self._position, data_state=state)
        return resumed

    def _build_engine(self, stage: StageConfig, resumed: CheckpointReader | None) -> StageEngine:
        """Model, weights and engine of a stage, with the optimizer state if the run is resumed inside it."""
        reader = self._weights

        def load(model: RxTModel) -> None:
            if reader is None:
                return
            missing = reader.load_weights(model, allow_missing=self._foreign_weights)
            if missing:
                logger.warning("%s: %d tensors start fresh (%s, ...)", reader.path, len(missing), missing[0])

        engine = build_engine(self._config, stage, self._world, load)
        if resumed is not None:
            resumed.load_fragments(engine.resumed_fragments())
            engine.set_optimizer_steps(resumed.state.optimizer_steps)
        return engine

    def _train(self, engine: StageEngine, stage: StageConfig, feed: Feed) -> None:
        """All remaining optimizer steps of the stage, with log lines and checkpoints."""
        config = self._config
        interval = config.checkpoint.every_steps
        optimizer = stage_optimizer(config, stage)
        meter = Meter()
        while self._position.stage_step < stage.steps:
            started = time.perf_counter()
            data = feed.next_step()
            tokens = data.counts["tokens"]
            stage_step, step = self._position.stage_step, self._position.step + 1
            last = stage_step + 1 == stage.steps
            logs = last or step % config.metrics.log_every_steps == 0
            saves = last or (interval is not None and step % interval == 0)
            rates = {s: learning_rate(optimizer, stage_step, stage.steps, s) for s in engine.group_starts}
            engine.module.observe(self._world.device if logs else None)
            engine.begin_step(stage_step, rates)
            metrics = self._optimizer_step(engine, feed, data)
            self._advance(data)
            meter.add(tokens)
            if logs or saves:
                values = self._global_values(engine, metrics)
                if logs:
                    figures = {
                        **values,
                        **engine.module.observations(data.counts),
                        "corrupt_blocks": data.corrupt_blocks,
                    }
                    self._log(engine, stage, figures, rates, meter, tokens)
                self._check_finite(stage, {"loss": values["loss"], "gradient norm": engine.gradient_norm()})
            self._callbacks.on_step(step, tokens, time.perf_counter() - started, data.wait_seconds)
            if saves:
                self._save(engine, stage, feed)
                meter.restart()

    def _optimizer_step(self, engine: StageEngine, feed: Feed, data: Step) -> torch.Tensor:
        """Forward, backward and update; returns this rank's share of the metric vector, on the device."""
        shares = []
        for batch in data.batches:
            on_device = batch.to(self._world.device, non_blocking=True)
            loss, metrics, stm = engine.forward(on_device, data.counts, feed.stm(batch))
            engine.backward_and_step(loss)
            feed.carry(batch, stm)
            shares.append(metrics)
        engine.end_step()
        return torch.stack(shares).sum(dim=0)

    def _advance(self, data: Step) -> None:
        before = self._position
        self._position = replace(
            before,
            step=before.step + 1,
            stage_step=before.stage_step + 1,
            tokens=before.tokens + data.counts["tokens"],
            data_state=data.state,
        )

    def _log(
        self,
        engine: StageEngine,
        stage: StageConfig,
        values: Mapping[str, float | None],
        rates: Mapping[int, float],
        meter: Meter,
        tokens: int,
    ) -> None:
        step_seconds, tokens_per_second = meter.read()
        record: dict[str, Any] = {
            "step": self._position.step,
            "stage": stage.name,
            **values,
            "grad_norm": engine.gradient_norm(),
            "lr": rates[min(rates)],
            "tokens": tokens,
            "total_tokens": self._position.tokens,
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
        }
        self._callbacks.on_log(record)

    def _global_values(self, engine: StageEngine, metrics: torch.Tensor) -> dict[str, float]:
        """Loss and metrics of the whole step, from this rank's share of them. Waits for the device."""
        values = sum_over_ranks(metrics.double()).tolist()
        return dict(zip(("loss", *engine.module.metric_names), values, strict=True))

    def _check_finite(self, stage: StageConfig, values: Mapping[str, float]) -> None:
        """A diverged run ends before it saves a checkpoint."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name} is {value} at step {self._position.step} (stage {stage.name}); "
                    "lower the learning rate or continue from an earlier checkpoint with --resume"
                )

    def _save(self, engine: StageEngine, stage: StageConfig, feed: Feed) -> None:
        started = time.perf_counter()
        self._callbacks.on_state(TrainState.CHECKPOINTING)
        position = self._position
        state = TrainerState(
            step=position.step,
            stage_index=position.stage_index,
            stage_name=stage.name,
            stage_step=position.stage_step,
            tokens=position.tokens,
            data_state=position.data_state or {},
            fingerprint=self._fingerprint,
            optimizer_steps=engine.optimizer_steps(),
            tensor_shapes=engine.tensor_shapes(),
        )
        run_dir = self._config.runtime.run_dir
        path = save_checkpoint(
            run_dir,
            state,
            {**engine.owned_fragments(), **feed.fragments()},
            text_files=text_files(run_dir) if self._world.is_main else {},
            keep_last=self._config.checkpoint.keep_last,
        )
        # The next stage starts from what was written, exactly as a resumed run would.
        self._weights = CheckpointReader(path, verified=True)
        self._foreign_weights = False
        seconds = time.perf_counter() - started
        logger.info("checkpoint %s saved in %.1f s", path.name, seconds)
        self._callbacks.on_checkpoint(position.step, seconds)
        self._callbacks.on_state(TrainState.TRAINING)

    def _evaluate(self, engine: StageEngine, stage: StageConfig, held_out: Pieces) -> None:
        self._callbacks.on_state(TrainState.EVALUATING)
        started = time.perf_counter()
        config = self._config
        module = engine.whole_module(lambda: build_stage(empty_model(config.model), config, stage))
        results = evaluate_stage(module, held_out, config, stage, self._world, self._tokenizer)
        record = {
            "step": self._position.step,
            "stage": stage.name,
            "stage_index": self._position.stage_index,
            "split": "val",
            **results,
            "seconds": time.perf_counter() - started,
        }
        self._callbacks.on_evaluation(record)
        numbers = {name: value for name, value in results.items() if isinstance(value, float)}
        summary = " ".join(f"{name} {value:.4f}" for name, value in numbers.items() if name != "tokens")
        logger.info("held-out %s after step %d: %s", stage.name, self._position.step, summary)
        dist.barrier()

    def _is_evaluated(self, stage: StageConfig) -> bool:
        """Whether rank 0 has the evaluation of this stage's end on file; the same answer on all ranks."""
        answer = [False]
        if self._world.is_main:
            position = self._position
            answer[0] = has_evaluation(
                self._config.runtime.run_dir,
                step=position.step,
                stage=stage.name,
                stage_index=position.stage_index,
            )
        dist.broadcast_object_list(answer, src=0)
        return answer[0]
