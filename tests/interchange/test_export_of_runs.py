"""Checkpoints and runs are exported like native folders, whatever ranks wrote them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.damage import flip_bit
from helpers.datasets import Datasets
from helpers.launch import run_function, run_ranks
from helpers.runs import SMALL, arguments, checkpoints, tensors, tree
from interchange_samples import full_tensors, model_of, read_published, tensors_equal, without_tables

from rxt_dist.checkpoint import TrainerState, save_checkpoint
from rxt_dist.checkpoint.fragments import Fragment
from rxt_dist.cli import main
from rxt_dist.config import ModelConfig, load_config
from rxt_dist.data.tokens import load_tokenizer
from rxt_dist.interchange.pretrained import load_pretrained
from rxt_dist.model import RxTModel
from rxt_dist.model.canonical import canonical_parts
from rxt_dist.model.stm import draw_stm
from rxt_dist.train.datasets import open_datasets, resolve
from rxt_dist.train.run_dir import create_run_dir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def rxt(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def save_run(run_dir: Path, config: ModelConfig, step: int) -> None:
    """A checkpoint of a model that every rank has, cut at a random place of every tensor."""
    model = model_of(config, seed=step)
    parameters = dict(model.named_parameters())
    generator, rank, size = np.random.default_rng(7), dist.get_rank(), dist.get_world_size()
    fragments, shapes = {}, {}
    for name, parts in canonical_parts(model).items():
        flat = parameters[name].detach().view(-1)
        for part in parts:
            cuts = [0, *sorted(generator.integers(0, part.numel + 1, size - 1).tolist()), part.numel]
            low, high = cuts[rank], cuts[rank + 1]
            if high > low:
                values = flat[part.start + low : part.start + high].clone()
                fragments[f"weight.{part.name}"] = Fragment.run(part.numel, low, values)
            shapes[part.name] = list(part.shape)
    state = TrainerState(
        step=step,
        stage_index=0,
        stage_name="joint_lm",
        stage_step=step,
        tokens=step,
        data_state={},
        fingerprint="made up",
        optimizer_steps=[step],
        tensor_shapes=shapes,
    )
    texts = {name: (run_dir / name).read_text() for name in ("config.yaml", "tokenizer.json")}
    save_checkpoint(run_dir, state, fragments, text_files=texts, keep_last=5)


@pytest.fixture(scope="module")
def runs(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run folders with checkpoints of steps 1 and 2, by the number of ranks that wrote them."""
    found = {}
    for ranks in (1, 2):
        run_dir = tmp_path_factory.mktemp("runs") / f"of{ranks}"
        overrides = [f"data.text={datasets.text}", f"data.conversations={datasets.conversations}"]
        config = load_config("tiny", [*overrides, f"runtime.run_dir={run_dir}"])
        config = resolve(config, open_datasets(config))
        create_run_dir(config, datasets.text / "tokenizer" / "tokenizer.json")
        for step in (1, 2):
            assert run_function(ranks, save_run, run_dir, config.model, step) == [0] * ranks
        found[ranks] = run_dir
    return found


def expected_export(run_dir: Path, step: int) -> tuple[RxTModel, dict[str, torch.Tensor]]:
    model = model_of(load_config(run_dir / "config.yaml").model, seed=step)
    stm = draw_stm(model.config, torch.zeros(1, dtype=torch.int64))
    return model, full_tensors(model, stm)[1]


def test_ranks_leave_no_trace(runs: dict[int, Path], tmp_path: Path) -> None:
    """One rank or two: byte for byte the same export, and the weights that the ranks had."""
    files = []
    for ranks, run_dir in runs.items():
        out = tmp_path / str(ranks)
        rxt("export", run_dir, "--output", out)
        files.append(tree(out))
        model, expected = expected_export(run_dir, 2)
        tensors_equal(without_tables(read_published(out)[1]), without_tables(expected))
        assert read_published(out)[0]["tokenizer_config"]["answer_token_id"] == 6
        rxt("import", out, out / "mlm_head", "--output", tmp_path / f"back{ranks}")
        back = load_pretrained(tmp_path / f"back{ranks}")
        tensors_equal(dict(back.model.state_dict()), dict(model.state_dict()))
    first, second = files
    assert first == second
    assert {name.partition("/")[0] for name in first} == {
        *("config.json", "model.safetensors", "tokenizer.json"),
        *("encoder", "decoder", "memory_attention", "mlm_head"),
    }


def test_a_checkpoint_can_be_named(runs: dict[int, Path], tmp_path: Path) -> None:
    checkpoint = runs[2] / "checkpoints" / "step-00000001"
    rxt("export", checkpoint, "--output", tmp_path / "out", "--components", "full")
    _, expected = expected_export(runs[2], 1)
    tensors_equal(
        without_tables(read_published(tmp_path / "out")[1]),
        without_tables(expected),
    )
    loaded = load_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.get_vocab() == load_tokenizer(checkpoint).get_vocab()


def test_the_newest_good_checkpoint_of_a_run_is_taken(
    runs: dict[int, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(runs[1], run_dir)
    flip_bit(run_dir / "checkpoints" / "step-00000002" / "tensors" / "__0_0.distcp")
    with caplog.at_level(logging.WARNING):
        rxt("export", run_dir, "--output", tmp_path / "out")
    assert "step-00000002" in caplog.text
    _, expected = expected_export(run_dir, 1)
    tensors_equal(without_tables(read_published(tmp_path / "out")[1]), without_tables(expected))
    damaged = run_dir / "checkpoints" / "step-00000002"
    assert main(["export", str(damaged), "--output", str(tmp_path / "no")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    assert main(["export", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "in") in message
    assert len(message.splitlines()) == 1
    (tmp_path / "in" / "checkpoints").mkdir()
    assert main(["export", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_trained_run_is_exported(datasets: Datasets, tmp_path: Path) -> None:
    """Two ranks that train; the checkpoint is read with torch's own reader."""
    settings: dict[str, Any] = SMALL | {
        "stages": "[{name: joint_lm, steps: 1}]",
        "optimizer.warmup_steps": 0,
        "precision": "bf16",
    }
    run_ranks(2, arguments(datasets, "run", settings), tmp_path).check()
    rxt("export", tmp_path / "run", "--output", tmp_path / "out")
    stored = tensors(checkpoints(tmp_path / "run")[1])
    _, exported, _ = read_published(tmp_path / "out")
    for ours, theirs in {
        "decoder.lm_head.weight": "decoder.model.head.weight",
        "encoder.embedding.weight": "encoder.model.embedding.weight",
        "decoder.layers.0.attention.k.weight": "decoder.model.layers.0.attention.k_proj.weight",
        "decoder.layers.1.cross_attention.v.weight": (
            "decoder.model.layers.1.memory_cross_attention.v_proj.weight"
        ),
    }.items():
        assert torch.equal(stored[f"weight.{ours}"], exported[theirs]), ours
    gate = stored["weight.memory_attention.gate.linear.weight"]
    for layer, values in enumerate(gate):
        key = f"memory_attention.model.residual_gate_layers.{layer}.gate.weight"
        assert torch.equal(exported[key], values)
