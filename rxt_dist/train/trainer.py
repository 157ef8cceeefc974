"""The training loop: stages in order, each from the weights of the one before it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from rxt_dist.checkpoint import CheckpointReader, TrainerState, save_checkpoint
from rxt_dist.config import (
    RunConfig,
    StageConfig,
    deepspeed_config,
    micro_packs,
    stage_optimizer,
)
from rxt_dist.data.loader import TextLoader, TextStep
from rxt_dist.data.order import PackCursor
from rxt_dist.data.pieces import PieceSource
from rxt_dist.errors import CheckpointError, TrainingError
from rxt_dist.model import build_model
from rxt_dist.observe.metrics import TrainState
from rxt_dist.observe.metrics_file import read_metrics
from rxt_dist.parallel.bootstrap import World
from rxt_dist.randomness import derive_key
from rxt_dist.stages import build_stage, open_pieces
from rxt_dist.train.callbacks import Callback
from rxt_dist.train.callbacks.metrics_log import EVALUATION_FILE
from rxt_dist.train.engine import StageEngine
from rxt_dist.train.evaluation import evaluate
from rxt_dist.train.run_dir import CONFIG_FILE, TOKENIZER
from rxt_dist.train.sampling import sample_continuations
from rxt_dist.train.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where the run stands between two optimizer steps."""

    step: int = 0
    stage_index: int = 0
    stage_step: int = 0
    tokens: int = 0
    cursor: PackCursor = field(default_factory=PackCursor)


class Trainer:
    """Runs the stages of a resolved configuration on all ranks of the process group.

    ``weights`` is a checkpoint to start from or None for fresh weights; with ``resume`` its optimizer,
    data position and counters are taken over too, else only its weights.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        tokenizer: Tokenizer,
        callbacks: Callback,
        *,
        weights: CheckpointReader | None,
        resume: bool,
    ) -> None:
        self._config = config
        self._world = world
        self._tokenizer = tokenizer
        self._callbacks = callbacks
        self._weights = weights
        self._resumed = weights.state if weights is not None and resume else None
        self._position = Position()
        if self._resumed is not None:
            state = self._resumed
            cursor = PackCursor.from_dict(state.data_cursor)
            self._position = Position(state.step, state.stage_index, state.stage_step, state.tokens, cursor)

    def run(self) -> None:
        """Train every stage that is not finished; returns when the last one is evaluated."""
        for index in range(self._position.stage_index, len(self._config.stages)):
            if index > self._position.stage_index:
                self._position = replace(self._position, stage_index=index, stage_step=0, cursor=PackCursor())
            self._run_stage(self._config.stages[index])

    def _run_stage(self, stage: StageConfig) -> None:
        finished = self._position.stage_step == stage.steps
        if finished and self._is_evaluated(stage):
            logger.info("stage %d (%s) is finished already", self._position.stage_index, stage.name)
            return
        source = open_pieces(self._config, stage, "train")
        held_out = open_pieces(self._config, stage, "val")
        self._check_fingerprint(source, stage)
        engine = self._build_engine(stage)
        try:
            if not finished:
                self._callbacks.on_stage_start(stage, self._position.step, self._position.stage_step)
                self._callbacks.on_state(TrainState.TRAINING)
                self._train(engine, stage, source)
                self._callbacks.on_stage_end()
            self._evaluate(engine, stage, held_out)
        finally:
            engine.close()

    def _build_engine(self, stage: StageConfig) -> StageEngine:
        """Model, weights and engine of a stage, with the optimizer state if the run is resumed inside it."""
        config, world = self._config, self._world
        model = build_model(config.model, config.seed)
        reader = self._weights
        if reader is not None:
            missing = reader.load_weights(model, allow_missing=self._resumed is None)
            if missing:
                logger.warning(
                    "%s has no weights for %d tensors (%s, ...): they start fresh",
                    reader.path,
                    len(missing),
                    missing[0],
                )
        module = build_stage(model, config, stage)
        module.to(world.device)
        fused = world.device.type == "cuda"
        optimizer = stage_optimizer(config, stage)
        settings = deepspeed_config(config, dp_size=world.size, optimizer=optimizer, fused=fused)
        engine = StageEngine(model, module, settings, world.device)
        resumed = self._resumed
        if reader is not None and resumed is not None and resumed.stage_index == self._position.stage_index:
            reader.load_fragments(engine.moment_fragments())
            engine.set_optimizer_step(resumed.optimizer_step)
        self._resumed = None
        return engine

    def _train(self, engine: StageEngine, stage: StageConfig, source: PieceSource) -> None:
        config, world = self._config, self._world
        special = config.model.special_tokens
        assert not isinstance(special, str)
        interval = config.checkpoint.every_steps
        optimizer = stage_optimizer(config, stage)
        meter = _Meter(config.metrics.log_every_steps)
        loader = TextLoader(
            source,
            key=derive_key(config.seed, "stage", stage.name, self._position.stage_index),
            packs=config.batch.packs,
            pack_tokens=config.batch.pack_tokens,
            micro_packs=micro_packs(config, world.size),
            dp_rank=world.rank,
            dp_size=world.size,
            masking_probability=stage.masking_probability,
            mask_id=special.mask,
            cursor=self._position.cursor,
            prefetch_steps=config.runtime.data_prefetch_steps,
            pin_memory=world.device.type == "cuda",
        )
        with loader:
            while self._position.stage_step < stage.steps:
                started = time.perf_counter()
                data = next(loader)
                rate = learning_rate(optimizer, self._position.stage_step, stage.steps)
                engine.set_learning_rate(rate)
                metrics = self._optimizer_step(engine, data)
                self._advance(data)
                last = self._position.stage_step == stage.steps
                meter.add(data.counts["tokens"])
                if last or meter.due(self._position.step):
                    self._log(engine, stage, metrics, rate, meter, data.counts["tokens"])
                seconds = time.perf_counter() - started
                self._callbacks.on_step(
                    self._position.step, data.counts["tokens"], seconds, data.wait_seconds
                )
                if last or (interval is not None and self._position.step % interval == 0):
                    self._save(engine, stage, source)
                    meter.restart()

    def _optimizer_step(self, engine: StageEngine, data: TextStep) -> torch.Tensor:
        """Forward, backward and update; returns this rank's share of the metric vector, on the device."""
        total: torch.Tensor | None = None
        for batch in data.batches:
            on_device = batch.to(self._world.device, non_blocking=True)
            loss, metrics = engine.forward(on_device, data.counts)
            engine.backward_and_step(loss)
            total = metrics if total is None else total + metrics
        assert total is not None
        return total

    def _advance(self, data: TextStep) -> None:
        before = self._position
        self._position = replace(
            before,
            step=before.step + 1,
            stage_step=before.stage_step + 1,
            tokens=before.tokens + data.counts["tokens"],
            cursor=data.cursor,
        )

    def _log(
        self,
        engine: StageEngine,
        stage: StageConfig,
        metrics: torch.Tensor,
        rate: float,
        meter: _Meter,
        tokens: int,
    ) -> None:
        metrics = metrics.double()
        dist.all_reduce(metrics)
        names = ("loss", *engine.module.metric_names)
        values = dict(zip(names, metrics.tolist(), strict=True))
        norm = engine.gradient_norm()
        step_seconds, tokens_per_second = meter.read()
        record: dict[str, Any] = {
            "step": self._position.step,
            "stage": stage.name,
            **values,
            "grad_norm": norm,
            "lr": rate,
            "tokens": tokens,
            "total_tokens": self._position.tokens,
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
        }
        self._callbacks.on_log(record)
        if not torch.isfinite(metrics[0]):
            raise TrainingError(
                f"the loss is {values['loss']} at step {self._position.step} (stage {stage.name}); "
                "lower the learning rate or continue from an earlier checkpoint with --resume"
            )

    def _save(self, engine: StageEngine, stage: StageConfig, source: PieceSource) -> None:
        started = time.perf_counter()
        self._callbacks.on_state(TrainState.CHECKPOINTING)
        position = self._position
        state = TrainerState(
            step=position.step,
            stage_index=position.stage_index,
            stage_name=stage.name,
            stage_step=position.stage_step,
            tokens=position.tokens,
            data_cursor=position.cursor.to_dict(),
            fingerprint=source.fingerprint,
            optimizer_step=engine.optimizer_step(),
            tensor_shapes=engine.tensor_shapes(),
        )
        run_dir = self._config.runtime.run_dir
        path = save_checkpoint(
            run_dir,
            state,
            engine.owned_fragments(),
            text_files=_texts(run_dir, (CONFIG_FILE, TOKENIZER)),
            keep_last=self._config.checkpoint.keep_last,
        )
        # The next stage starts from what was written, exactly as a resumed run would.
        self._weights = CheckpointReader(path, verified=True)
        seconds = time.perf_counter() - started
        logger.info("checkpoint %s saved in %.1f s", path.name, seconds)
        self._callbacks.on_checkpoint(position.step, seconds)
        self._callbacks.on_state(TrainState.TRAINING)

    def _evaluate(self, engine: StageEngine, stage: StageConfig, held_out: PieceSource) -> None:
        self._callbacks.on_state(TrainState.EVALUATING)
        started = time.perf_counter()
        values = evaluate(engine.module, held_out, self._config, stage, self._world)
        samples: list[dict[str, str]] = []
        if self._world.is_main:
            special = self._config.model.special_tokens
            assert not isinstance(special, str)
            samples = sample_continuations(
                engine.module,
                held_out,
                self._tokenizer,
                self._config.evaluation,
                seq_len=self._config.model.seq_len,
                end_token=special.eos,
                device=self._world.device,
            )
        record = {
            "step": self._position.step,
            "stage": stage.name,
            "stage_index": self._position.stage_index,
            "split": "val",
            **values,
            "seconds": time.perf_counter() - started,
            "samples": samples,
        }
        self._callbacks.on_evaluation(record)
        summary = " ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "tokens")
        logger.info("held-out %s after step %d: %s", stage.name, self._position.step, summary)
        dist.barrier()

    def _is_evaluated(self, stage: StageConfig) -> bool:
        """Whether rank 0 has the evaluation of this stage's end on file; the same answer on all ranks."""
        answer = [False]
        if self._world.is_main:
            records = read_metrics(self._config.runtime.run_dir / EVALUATION_FILE)
            ours = {
                "step": self._position.step,
                "stage": stage.name,
                "stage_index": self._position.stage_index,
            }
            answer[0] = any(all(record.get(k) == v for k, v in ours.items()) for record in records)
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def _check_fingerprint(self, source: PieceSource, stage: StageConfig) -> None:
        resumed = self._resumed
        if resumed is None or resumed.stage_index != self._position.stage_index:
            return
        if resumed.fingerprint != source.fingerprint:
            raise CheckpointError(
                f"the dataset of stage {stage.name} has fingerprint {source.fingerprint[:12]}; the checkpoint "
                f"was made with {resumed.fingerprint[:12]}: give the dataset the run was started with"
            )


class _Meter:
    """Wall time and tokens since the last reading."""

    def __init__(self, every: int) -> None:
        self._every = every
        self.restart()

    def restart(self) -> None:
        """Start anew, so that what happened in between (a save) is not counted as training."""
        self._started = time.perf_counter()
        self._steps = 0
        self._tokens = 0

    def add(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def read(self) -> tuple[float, float]:
        """Seconds a step and tokens a second since the last reading, which this call ends."""
        elapsed = time.perf_counter() - self._started
        result = elapsed / max(1, self._steps), self._tokens / max(elapsed, 1e-9)
        self.restart()
        return result


def _texts(folder: Path, names: tuple[str, ...]) -> Mapping[str, str]:
    return (
        {name: (folder / name).read_text(encoding="utf-8") for name in names} if dist.get_rank() == 0 else {}
    )
