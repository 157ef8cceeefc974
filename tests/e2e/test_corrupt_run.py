"""Runs over damaged and mixed datasets: the same on any number of ranks and after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Datasets, with_system_prompts
from helpers.launch import Result, run_ranks
from helpers.runs import (
    SMALL,
    arguments,
    checkpoints,
    evaluations,
    metrics,
    relative,
    tensors,
    trainer_state,
    uninterrupted,
    untimed,
)

from data_prep.cli import main as rxt_data
from rxt_dist.data.format import ShardIndex
from rxt_dist.data.manifest import load_manifest

STAGES = ("joint_lm", "interaction_sft", "memory_attention", "smat")
STEPS = 3  # of each stage
SAVED = [2, 3, 4, 6, 8, 9, 10, 12]


def small_blocks(dataset: Path, folder: Path) -> Path:
    """The corpus of ``dataset`` in blocks of 64 documents."""
    kind = load_manifest(dataset).kind
    source = dataset.parent / "corpus" / f"{'stories' if kind == 'text' else kind}.jsonl"
    options = ["--tokenizer", dataset.parent / "tokenizer", "--output", folder, "--workers", 1]
    options += ["--val-fraction", 0.1, "--block-documents", 64]
    assert rxt_data([str(part) for part in ("shard", kind, "--input", source, *options)]) == 0
    return folder


def damaged(dataset: Path, folder: Path, blocks: list[int]) -> Path:
    """The corpus of ``dataset`` with one bit wrong in each of ``blocks`` of the first training shard."""
    small_blocks(dataset, folder)
    shard = load_manifest(folder).shards_of("train")[0].path_in(folder)
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    for row in ShardIndex.read(shard.with_suffix(".idx")).blocks[blocks]:
        content[int(row["offset"]) + int(row["bytes"]) // 2] ^= 4
    shard.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def damaged_folders(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets with one damaged block each, by kind."""
    folder = tmp_path_factory.mktemp("damaged")
    return {
        "text": damaged(datasets.text, folder / "text", [0]),
        "conversations": damaged(datasets.conversations, folder / "conversations", [1]),
    }


@pytest.fixture(scope="module")
def settings(datasets: Datasets, damaged_folders: dict[str, Path]) -> dict[str, Any]:
    text = damaged_folders["text"]
    parts = f"{{path: {datasets.fewer_stories}}}, {{path: {text}, weight: 2}}"
    talks = f"{{path: {damaged_folders['conversations']}, weight: 3}}, {{path: {datasets.conversations}}}"
    return SMALL | {
        "data.text": f"[{parts}]",
        "data.conversations": f"[{talks}]",
        "data.on_corrupt": "skip",
        "data.max_corrupt_blocks": 2,
        "batch.lanes": 4,
        "batch.micro_packs": 1,  # the experts' balance loss is a mean over what is computed at once
        "batch.micro_lanes": 1,
        "model.stm_init": "{distribution: standard, shared: false}",
        "stages": "[" + ", ".join(f"{{name: {stage}, steps: {STEPS}}}" for stage in STAGES) + "]",
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 100,
    }


@pytest.fixture(scope="module")
def whole(
    datasets: Datasets, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """An uninterrupted run by number of ranks; all of its checkpoints were kept."""
    return {ranks: uninterrupted(datasets, tmp_path_factory, ranks, settings, SAVED) for ranks in (1, 2)}


def assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) == STEPS * len(STAGES)
    for own, reference in zip(ours, theirs, strict=True):
        assert own.keys() == reference.keys()
        for key, value in reference.items():
            if isinstance(value, float):
                close = abs(own[key] - value) <= 1e-6 or relative(own[key], value) <= 2e-5
                assert close, (own["step"], key)
            else:
                assert own[key] == value


def test_the_ranks_leave_out_the_same_whoever_reads_the_damage(
    whole: dict[int, Path], damaged_folders: dict[str, Path]
) -> None:
    records = untimed(metrics(whole[1]))
    assert_close(untimed(metrics(whole[2])), records)
    blocks = {record["step"]: record["corrupt_blocks"] for record in records}
    assert list(blocks.values()) == sorted(blocks.values())
    assert [blocks[STEPS * number] for number in range(1, 5)] == [1, 2, 2, 2]  # of text, then of both kinds
    states = [trainer_state(checkpoints(whole[2])[step])["data_state"] for step in (3, 12)]
    names = [load_manifest(damaged_folders[kind]).fingerprint for kind in ("text", "conversations")]
    assert states[0]["corrupt_blocks"] == [[names[0], 0]]
    assert states[1]["corrupt_blocks"] == sorted([[names[0], 0], [names[1], 1]])
    assert [state.keys() >= {"pack", "datasets"} for state in states] == [True, False]
    assert states[0]["pack"] == STEPS * SMALL["batch.packs"]


def test_what_is_left_out_is_not_counted(
    whole: dict[int, Path], settings: dict[str, Any], datasets: Datasets, tmp_path: Path
) -> None:
    """The same run over the intact datasets has more tokens, and losses of the same size."""
    sound = settings | {"data.conversations": datasets.conversations}
    sound["data.text"] = f"[{{path: {datasets.fewer_stories}}}, {{path: {datasets.text}, weight: 2}}]"
    run_ranks(1, arguments(datasets, "run", sound), tmp_path).check()
    some, all_of_them = metrics(whole[1]), metrics(tmp_path / "run")
    assert {record["corrupt_blocks"] for record in all_of_them} == {0}
    assert some[-1]["total_tokens"] < 0.9 * all_of_them[-1]["total_tokens"]
    for own, reference in zip(some[:STEPS], all_of_them[:STEPS], strict=True):
        assert 0.8 < own["loss"] / reference["loss"] < 1.25


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [(2, 2, 2), (2, 2, 10), pytest.param(1, 2, 4, marks=pytest.mark.slow), (2, 1, 8), (1, 4, 2)],
)
def test_an_interrupted_run_leaves_out_the_same(
    whole: dict[int, Path],
    settings: dict[str, Any],
    datasets: Datasets,
    tmp_path: Path,
    before: int,
    after: int,
    step: int,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole[before], run_dir)
    for number, path in checkpoints(run_dir).items():
        if number > step:
            shutil.rmtree(path)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    changed = settings | {"runtime.data_prefetch_steps": 1 + after}
    result = run_ranks(after, [*arguments(datasets, "run", changed), "--resume"], tmp_path).check()
    assert f"from step {step}" in result.output
    ours, theirs = untimed(metrics(run_dir)), untimed(metrics(whole[before]))
    if before != after:
        assert_close(ours, theirs)
        return
    assert ours == theirs
    assert untimed(evaluations(run_dir)) == untimed(evaluations(whole[before]))
    found, expected = (tensors(checkpoints(folder)[SAVED[-1]]) for folder in (run_dir, whole[before]))
    assert [name for name, values in found.items() if not torch.equal(values, expected[name])] == []


Start = Callable[[Mapping[str, Any]], Result]


@pytest.fixture
def start(datasets: Datasets, settings: dict[str, Any], tmp_path: Path) -> Start:
    def call(changes: Mapping[str, Any]) -> Result:
        return run_ranks(2, arguments(datasets, "run", settings | dict(changes)), tmp_path)

    return call


def refusals(result: Result) -> set[str]:
    return {line for line in result.output.splitlines() if line.startswith("error: ")}


def test_more_damage_than_allowed_ends_the_run_on_all_ranks(
    start: Start, datasets: Datasets, tmp_path: Path
) -> None:
    text = damaged(datasets.text, tmp_path / "text", [0, 1])
    result = start({"data.text": text, "data.max_corrupt_blocks": 1})
    assert result.codes == [2, 2]
    (line,) = refusals(result)
    assert "data.max_corrupt_blocks: 2 blocks of the run's data are damaged, valid are at most 1" in line
    assert f"{text / 'train' / 'rxt-train-000000.tar'} is damaged: block " in line


def test_the_blocks_of_all_stages_count(start: Start, damaged_folders: dict[str, Path]) -> None:
    result = start({"data.max_corrupt_blocks": 1})
    assert result.codes == [2, 2]
    (line,) = refusals(result)
    assert "2 blocks of the run's data are damaged" in line
    assert f"{damaged_folders['conversations'] / 'train' / 'rxt-train-000000.tar'} is damaged" in line
    assert "interaction_sft 1/" not in result.output or "joint_lm 3/3" in result.output


def test_by_default_damage_ends_the_run(start: Start, datasets: Datasets, tmp_path: Path) -> None:
    text = damaged(datasets.text, tmp_path / "text", [0, 1])
    result = start({"data.text": text, "data.on_corrupt": "error"})
    assert 2 in result.codes
    assert any(f"{text / 'train' / 'rxt-train-000000.tar'} is damaged" in line for line in refusals(result))


def test_a_mixed_dataset_with_another_tokenizer_is_refused(start: Start, datasets: Datasets) -> None:
    parts = f"[{{path: {datasets.text}}}, {{path: {datasets.other_tokenizer}}}]"
    result = start({"data.text": parts})
    assert result.codes == [2, 2]
    (line,) = refusals(result)
    assert "same tokenizer" in line
    assert f"data.text.1 ({datasets.other_tokenizer})" in line


@pytest.mark.parametrize("step", [2, 10])
def test_a_changed_dataset_is_accepted_only_when_told(
    whole: dict[int, Path], settings: dict[str, Any], datasets: Datasets, tmp_path: Path, step: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole[2], run_dir)
    for number, path in checkpoints(run_dir).items():
        if number > step:
            shutil.rmtree(path)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    epoch = 1 + max(_epochs(trainer_state(checkpoints(run_dir)[step])["data_state"]))
    name = {2: "data.text", 10: "data.conversations"}[step]
    # One dataset less in the mixture of texts, or one more in that of conversations.
    added = f", {{path: {with_system_prompts(datasets, tmp_path)}, weight: 2}}]"
    other = {2: datasets.fewer_stories, 10: settings["data.conversations"].replace("]", added)}[step]
    changed = settings | {name: other}
    refused = run_ranks(1, [*arguments(datasets, "run", changed), "--resume"], tmp_path)
    assert refused.codes == [2]
    (line,) = refusals(refused)
    assert "fingerprint" in line
    assert "data.accept_changed" in line
    accepted = changed | {"data.accept_changed": "true"}
    result = run_ranks(1, [*arguments(datasets, "run", accepted), "--resume"], tmp_path).check()
    assert "going on with this one at its next epoch" in result.output
    records = metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, SAVED[-1] + 1))
    saved = trainer_state(checkpoints(run_dir)[{2: 3, 10: 12}[step]])
    assert min(_epochs(saved["data_state"])) >= epoch
    assert len(saved["data_state"]["datasets"]) == {2: 1, 10: 3}[step]


def _epochs(state: Mapping[str, Any]) -> list[int]:
    return [place["epoch"] for place in state["datasets"]]
