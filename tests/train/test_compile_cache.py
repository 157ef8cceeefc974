"""What a process has compiled, the next one finds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.launch import run_function
from helpers.step_guards import loop_of, losses_of, one_rank, prepared

SETTINGS = ("precision=bf16", "runtime.compile=true", "model.embed_dim=32")


def train(folder: Path, name: str) -> None:
    """Two compiled steps with the cache in ``folder``; writes down losses, and what was in the cache."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    from torch._dynamo.utils import counters

    with (
        one_rank(torch.device("cpu")) as world,
        prepared(SETTINGS, folder, world) as config,
        loop_of(config, "interaction_sft", world) as loop,
    ):
        losses = losses_of(loop, 2)
    found = counters["inductor"]
    counts = {kind: found[f"fxgraph_cache_{kind}"] for kind in ("hit", "miss", "bypass")}
    (folder / f"{name}.json").write_text(json.dumps({"losses": losses, **counts}))


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    found = {}
    for name in ("first", "second"):
        assert run_function(1, train, tmp_path, name, timeout=600) == [0]
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["first"]["miss"] >= 5
    assert (found["second"]["miss"], found["second"]["bypass"]) == (0, 0)
    assert found["second"]["hit"] >= found["first"]["miss"]
    assert found["second"]["losses"] == found["first"]["losses"]
