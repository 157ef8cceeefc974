"""The program that every rank runs: read the configuration, check everything, train."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from rxt_dist.arguments import add_overrides
from rxt_dist.checkpoint import CheckpointReader, find_checkpoint
from rxt_dist.config import RunConfig, check_world_size, load_config
from rxt_dist.data.store import DatasetStore
from rxt_dist.data.tokens import TOKENIZER_FILE, load_tokenizer
from rxt_dist.errors import FAILED_EXIT_CODE, USER_ERROR_EXIT_CODE, ConfigError, RxtError, TrainingError
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.kernels.compilation import set_compile
from rxt_dist.observe.logging import setup_logging
from rxt_dist.observe.metrics import TrainState
from rxt_dist.observe.metrics_file import EVALUATION_FILE, METRICS_FILE, truncate_after
from rxt_dist.parallel.bootstrap import World, start_process_group, world_from_environment
from rxt_dist.parallel.peers import set_peer_copies
from rxt_dist.stages import dataset_store
from rxt_dist.train.callbacks import Callback, CallbackList, MetricsLog, ProgressBar, PrometheusCallback
from rxt_dist.train.datasets import check_splits, open_datasets, resolve
from rxt_dist.train.initial_weights import check_weights, open_weights
from rxt_dist.train.run_dir import CONFIG_FILE, check_continuation, create_run_dir, write_config

logger = logging.getLogger(__name__)

# A rank that fails while local rank 0 is about to print the same message waits this long, so that the
# launcher does not end local rank 0 before it has spoken.
_QUIET_SECONDS = 3.0

T = TypeVar("T")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train the stages of a run file. Start with the deepspeed launcher or torchrun.",
    )
    parser.add_argument(
        "--config", required=True, help="run file, or the name of a packaged one (tiny, micro, ...)"
    )
    add_overrides(parser, "stages.0.steps=100")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in runtime.run_dir"
    )
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="PATH",
        help="run, checkpoint or native model folder whose weights a new run starts from",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="set by the launcher; the environment decides"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of every rank. Returns the exit code; user errors are one message and code 2."""
    arguments = parse_arguments(argv)
    local_rank = 0
    try:
        world = world_from_environment()
        local_rank = world.local_rank
        setup_logging(world.rank)
        _run(arguments, world)
    except RxtError as error:
        if local_rank != 0:
            time.sleep(_QUIET_SECONDS)
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        return USER_ERROR_EXIT_CODE
    except TrainingError as error:
        logger.error("%s", error)
        return FAILED_EXIT_CODE
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _run(arguments: argparse.Namespace, world: World) -> None:
    """Everything that can be checked is checked before a process group exists."""
    config = load_config(arguments.config, arguments.overrides)
    check_world_size(config, world.size)
    world = replace(world, tensor_size=config.parallel.tensor_size)
    if arguments.resume and arguments.init_from is not None:
        raise ConfigError("--resume and --init-from exclude each other: a resumed run has its own weights")
    store = dataset_store(config)
    opened = open_datasets(config, store)
    config = resolve(config, opened)
    check_splits(config, store)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    set_compile(config.runtime.compile, with_messages=config.parallel.tensor_size > 1)
    set_peer_copies(config.runtime.peer_copies)
    set_attention_backend(config.runtime.attention_backend, world.device, dtype)
    tokenizer_folder = next(iter(opened.values())).tokenizer_folder()
    start_process_group(world, config.runtime.collective_timeout_seconds)
    weights = _on_main(world, lambda: _prepare(arguments, config, tokenizer_folder / TOKENIZER_FILE))
    _train(config, world, store, tokenizer_folder, weights, arguments.resume)
    dist.barrier()


def _train(
    config: RunConfig,
    world: World,
    store: DatasetStore,
    tokenizer: Path,
    weights: Path | None,
    resume: bool,
) -> None:
    from rxt_dist.train.trainer import Trainer

    reader = None if weights is None else open_weights(weights, verified=True)
    callbacks: list[Callback] = []
    if config.metrics.prometheus.enabled:
        first_step = reader.state.step if resume and isinstance(reader, CheckpointReader) else 0
        callbacks.append(PrometheusCallback(config, world, first_step))
    if world.is_main:
        callbacks += [MetricsLog(config.runtime.run_dir), ProgressBar()]
    listeners = CallbackList(callbacks)
    try:
        listeners.on_state(TrainState.INIT)
        trainer = Trainer(
            config, world, store, load_tokenizer(tokenizer), listeners, weights=reader, resume=resume
        )
        trainer.run()
    finally:
        listeners.close()


def _prepare(arguments: argparse.Namespace, config: RunConfig, tokenizer: Path) -> Path | None:
    """On rank 0: make or check the run folder; returns what to start from, verified."""
    run_dir = config.runtime.run_dir
    if not arguments.resume:
        source = arguments.init_from
        start = None if source is None else check_weights(source, config.model, tokenizer.parent)
        create_run_dir(config, tokenizer)
        return start
    if not (run_dir / CONFIG_FILE).is_file():
        logger.warning("nothing to resume in %s: starting from the beginning", run_dir)
        create_run_dir(config, tokenizer)
        return None
    checkpoint = find_checkpoint(run_dir)
    state = None if checkpoint is None else CheckpointReader(checkpoint, verified=True).state
    check_continuation(config, None if state is None else state.stage_index)
    write_config(config)
    step = 0 if state is None else state.step
    logger.info("resuming %s from step %d", run_dir, step)
    for name in (METRICS_FILE, EVALUATION_FILE):
        truncate_after(run_dir / name, step)
    return checkpoint


def _on_main(world: World, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and hand its result, or its user error, to all ranks."""
    outcome: list[T | RxtError | None] = [None]
    if world.is_main:
        try:
            outcome[0] = action()
        except RxtError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], RxtError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]
