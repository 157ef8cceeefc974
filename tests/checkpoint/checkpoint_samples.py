"""Checkpoints of made-up tensors, and what ranks do in the tests of saving."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rxt_dist.checkpoint import TrainerState, save_checkpoint
from rxt_dist.checkpoint.fragments import Fragment

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 4, 2), "scalar": ()}
SIZES = {name: int(np.prod(shape, dtype=int)) for name, shape in SHAPES.items()}
KINDS = ("weight", "exp_avg", "exp_avg_sq")
KILLED = 77


def trainer_state(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> TrainerState:
    return TrainerState(
        step=step,
        stage_index=0,
        stage_name="joint_lm",
        stage_step=step,
        tokens=100 * step,
        data_state={"epoch": 0, "piece": step},
        fingerprint="made up",
        optimizer_steps=[step],
        tensor_shapes={name: list(shape) for name, shape in shapes.items()},
    )


def content(key: str, step: int) -> torch.Tensor:
    """The flat values of an entry: different for every key and step."""
    seed = sum(ord(letter) * 31**i for i, letter in enumerate(key)) % 2**31 + step
    size = SIZES[key.partition(".")[2]]
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size, dtype=np.float32))


def keys() -> list[str]:
    return [f"{kind}.{name}" for kind in KINDS for name in SHAPES]


def runs_of_ranks(size: int, ranks: int, seed: int) -> list[slice]:
    """``size`` values cut at random places into one run for every rank; some may be empty."""
    cuts = sorted(np.random.default_rng(seed).integers(0, size + 1, ranks - 1).tolist())
    return [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, size], strict=True)]


def save_made_up(run_dir: Path, step: int, keep_last: int = 2, seed: int = 0) -> Path:
    """Save the content of ``step`` on all ranks of the group, cut at random into fragments."""
    fragments = {}
    for number, key in enumerate(keys()):
        values = content(key, step)
        run = runs_of_ranks(values.numel(), dist.get_world_size(), seed + number)[dist.get_rank()]
        if run.stop > run.start:
            fragments[key] = Fragment.run(values.numel(), run.start, values[run])
    texts = {"config.yaml": f"step: {step}\n"}
    return save_checkpoint(run_dir, trainer_state(step), fragments, text_files=texts, keep_last=keep_last)


_OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


@contextmanager
def operations(action: Callable[[int, str], None]) -> Iterator[None]:
    """Call ``action(number, name)`` before every operation on the file system that makes a change last."""
    count = 0

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            action(count, name)
            count += 1
            return function(*arguments, **options)

        return call

    originals = {name: getattr(os, name) for name in _OPERATIONS}
    try:
        for name, function in originals.items():
            setattr(os, name, wrapped(name, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(os, name, function)


def save_and_die(run_dir: Path, step: int, keep_last: int, fatal: int) -> None:
    """Save, but end the process at once before operation number ``fatal``."""

    def die(number: int, _name: str) -> None:
        if number == fatal:
            os._exit(KILLED)

    with operations(die):
        save_made_up(run_dir, step, keep_last)
