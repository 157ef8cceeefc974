"""Mistakes of a user, made with the real program: one sentence that names the field, and exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.damage import flip_bit
from helpers.datasets import Datasets
from helpers.launch import Result, run_ranks
from helpers.runs import SMALL, arguments, checkpoints, tree

# One step is enough: what a user gets wrong is found before the first one.
SETTINGS: dict[str, Any] = SMALL | {
    "stages": "[{name: joint_lm, steps: 1}, {name: interaction_sft, steps: 1}]",
    "optimizer.warmup_steps": 0,
}

Start = Callable[..., Result]


@pytest.fixture(scope="module")
def finished(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    run_ranks(1, arguments(datasets, "run", SETTINGS), folder).check()
    return folder / "run"


@pytest.fixture
def start(datasets: Datasets, tmp_path: Path) -> Start:
    """Start the program as a single process with the run folder ``tmp_path/work/run``."""

    def call(settings: dict[str, Any], *options: object, ranks: int = 1) -> Result:
        command = [*arguments(datasets, "run", SETTINGS | settings), *map(str, options)]
        return run_ranks(ranks, command, tmp_path / "work", launcher=ranks > 1)

    return call


def assert_refused(result: Result, *fragments: str) -> None:
    """Exit code 2, and one message on one line that holds every fragment."""
    assert set(result.codes) == {2}, (result.codes, result.output)
    assert "Traceback" not in result.output, result.output
    messages = {line for line in result.output.splitlines() if line.startswith("error: ")}
    assert len(messages) == 1, result.output
    (message,) = messages
    for fragment in fragments:
        assert fragment in message, (fragment, message)
    assert len(message) < 400, message


CONFIGURATION: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"optimizer.learning_rate": 0.1}, ["optimizer.learning_rate", "valid"]),
    "misspelt key": ({"batch.pack_token": 64}, ["batch.pack_token", "batch.pack_tokens"]),
    "wrong type": ({"batch.packs": "many"}, ["batch.packs", "many", "integer"]),
    "out of range": ({"optimizer.lr": -1}, ["optimizer.lr", "-1"]),
    "unknown stage": ({"stages": "[{name: memory, steps: 1}]"}, ["stages.0.name", "memory", "joint_lm"]),
    "pack too small": ({"batch.pack_tokens": 32}, ["batch.pack_tokens", "32", "seq_len"]),
    "no dataset": ({"data.text": "null"}, ["data.text", "not set", "joint_lm"]),
    "missing dataset": ({"data.text": "nowhere"}, ["nowhere", "no "]),
    "other vocabulary": ({"model.vocab_size": 999}, ["model.vocab_size", "999", "320"]),
    "flash on a CPU": (
        {"runtime.attention_backend": "flash", "precision": "bf16"},
        ["runtime.attention_backend", "flash"],
    ),
    "owned by another field": (
        {"deepspeed.gradient_clipping": 1.0},
        ["deepspeed.gradient_clipping", "optimizer.clip_norm"],
    ),
}


@pytest.mark.parametrize("name", CONFIGURATION)
def test_a_wrong_configuration_is_refused(start: Start, tmp_path: Path, name: str) -> None:
    settings, fragments = CONFIGURATION[name]
    assert_refused(start(settings), *fragments)
    assert not (tmp_path / "work" / "run").exists()


def test_datasets_of_the_wrong_kind_are_refused(start: Start, datasets: Datasets, tmp_path: Path) -> None:
    result = start({"data.text": datasets.conversations})
    assert_refused(result, "data.text", str(datasets.conversations), "conversations", "expected text")
    result = start({"data.conversations": datasets.text})
    assert_refused(result, "data.conversations", str(datasets.text), "expected conversations")
    assert not (tmp_path / "work" / "run").exists()


def test_datasets_with_different_tokenizers_are_refused(
    start: Start, datasets: Datasets, tmp_path: Path
) -> None:
    result = start({"data.text": datasets.other_tokenizer})
    assert_refused(result, "same tokenizer", str(datasets.other_tokenizer), str(datasets.conversations))
    assert not (tmp_path / "work" / "run").exists()


def test_an_incomplete_dataset_is_refused(start: Start, datasets: Datasets, tmp_path: Path) -> None:
    copy = tmp_path / "incomplete"
    shutil.copytree(datasets.text, copy)
    (copy / "manifest.json").unlink()
    assert_refused(start({"data.text": copy}), str(copy), "manifest.json")
    assert not (tmp_path / "work" / "run").exists()


def test_a_missing_shard_is_refused(start: Start, datasets: Datasets, tmp_path: Path) -> None:
    copy = tmp_path / "incomplete"
    shutil.copytree(datasets.text, copy)
    (shard,) = (copy / "train").glob("*.tar")
    shard.unlink()
    assert_refused(start({"data.text": copy}), shard.name)
    assert not (tmp_path / "work" / "run").exists()


def test_a_batch_that_cannot_be_dealt_out_is_refused(start: Start, tmp_path: Path) -> None:
    assert_refused(start({"batch.packs": 3}, ranks=2), "batch.packs (3)", "2 ranks", "valid", "1, 3")
    assert_refused(start({"batch.packs": 4, "batch.micro_packs": 3}), "batch.micro_packs", "3", "1, 2, 4")
    assert not (tmp_path / "work" / "run").exists()


def test_a_missing_run_file_is_refused(start: Start, tmp_path: Path) -> None:
    assert_refused(start({}, "--config", "enormous"), "enormous", "tiny")
    assert not (tmp_path / "work" / "run").exists()


def test_a_used_run_folder_is_never_overwritten(start: Start, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "work" / "run"
    shutil.copytree(finished, run_dir)
    before = tree(run_dir)
    assert_refused(start({}), "runtime.run_dir", "run", "not empty", "--resume")
    assert tree(run_dir) == before


def test_a_file_in_place_of_the_run_folder_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run").write_text("mine")
    assert_refused(start({}), "runtime.run_dir")
    assert (tmp_path / "work" / "run").read_text() == "mine"


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "seed": ({"seed": 3}, ["seed", "0", "3"]),
    "model": ({"model.embed_dim": 128}, ["model.embed_dim", "64", "128"]),
    "nested model": ({"model.decoder.moe.top_k": 1}, ["model.decoder.moe.top_k", "2", "1"]),
    "precision": ({"precision": "bf16"}, ["precision", "fp32", "bf16"]),
    "packs": ({"batch.packs": 8}, ["batch.packs", "4", "8"]),
    "pack size": ({"batch.pack_tokens": 128}, ["batch.pack_tokens", "64", "128"]),
    "finished stage": (
        {"stages.0.masking_probability": 0.3},
        ["stages.0.masking_probability", "0.15", "0.3"],
    ),
    "current stage": ({"stages.1.steps": 7}, ["stages.1.steps", "1", "7"]),
    "fewer stages": ({"stages": "[{name: joint_lm, steps: 1}]"}, ["stages", "1"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resumed_run_cannot_change_what_it_stands_on(
    start: Start, finished: Path, tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "work" / "run"
    shutil.copytree(finished, run_dir)
    before = tree(run_dir)
    settings, fragments = CHANGES[name]
    assert_refused(start(settings, "--resume"), *fragments)
    assert tree(run_dir) == before


def test_a_resumed_run_needs_its_dataset(
    start: Start, finished: Path, datasets: Datasets, tmp_path: Path
) -> None:
    """A dataset with the same tokenizer but other documents would be another run."""
    run_dir = tmp_path / "work" / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(checkpoints(run_dir)[2])
    (run_dir / "eval.jsonl").write_text("")
    before = {name for name in tree(run_dir) if "checkpoints" in name}
    assert_refused(start({"data.text": datasets.fewer_stories}, "--resume"), "fingerprint", "joint_lm")
    assert {name for name in tree(run_dir) if "checkpoints" in name} == before


def test_initial_weights_must_be_a_sound_checkpoint(start: Start, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "work" / "run"
    (tmp_path / "empty").mkdir()
    for path in (
        tmp_path / "nowhere",
        tmp_path / "empty",
        finished / "config.yaml",
        finished / "checkpoints",
    ):
        assert_refused(start({}, "--init-from", path), str(path), "not a checkpoint")
        assert not run_dir.exists()
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints(finished)[2], damaged)
    flip_bit(damaged / "tensors" / "__0_0.distcp")
    assert_refused(start({}, "--init-from", damaged), str(damaged), "damaged", "__0_0.distcp")
    assert not run_dir.exists()


def test_initial_weights_must_fit_the_model(start: Start, finished: Path, tmp_path: Path) -> None:
    result = start({"model.encoder.ff_dim": 64}, "--init-from", finished)
    assert_refused(result, "encoder.layers.0.feed_forward", "[128, 64]", "[64, 64]")
    assert not (tmp_path / "work" / "run").exists()


def test_resume_and_initial_weights_exclude_each_other(start: Start, finished: Path, tmp_path: Path) -> None:
    assert_refused(start({}, "--resume", "--init-from", finished), "--resume", "--init-from")
    assert not (tmp_path / "work" / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(start({"runtime.run_dir": tmp_path / "file" / "run"}), "runtime.run_dir", "file/run")


def test_every_rank_reports_the_same_mistake(start: Start, finished: Path, tmp_path: Path) -> None:
    """One that only rank 0 can see reaches the other ranks, so that none of them hangs."""
    shutil.copytree(finished, tmp_path / "work" / "run")
    assert_refused(start({}, ranks=2), "runtime.run_dir", "not empty")
