"""The garbage collector does not go over a running stage's objects, and a closed one's are given back."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import torch
from helpers.launch import run_function
from helpers.step_guards import loop_of, losses_of, one_rank, prepared


def train(folder: Path) -> None:
    """Objects that the collector leaves alone: before and after steps, and after the stage; whether the
    parameters were given back."""
    found = []
    gc.unfreeze()  # ranks are forked from a process that froze what it had
    with one_rank(torch.device("cpu")) as world, prepared((), folder, world) as config:
        with loop_of(config, "joint_lm", world) as loop:
            losses_of(loop, 2)
            found.append(gc.get_freeze_count())
            losses_of(loop, 2)
            found.append(gc.get_freeze_count())
            parameter = weakref.ref(next(loop.engine.module.parameters()))
        found.append(gc.get_freeze_count())
        del loop
        with loop_of(config, "smat", world):
            found.append(parameter() is None)
    (folder / "found.json").write_text(json.dumps(found))


def test_objects_of_a_stage_are_left_alone_while_it_runs(tmp_path: Path) -> None:
    assert run_function(1, train, tmp_path) == [0]
    before, running, after, given_back = json.loads((tmp_path / "found.json").read_text())
    assert (before, after, given_back) == (0, 0, True)
    assert running > 100_000
