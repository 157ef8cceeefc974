"""Evaluating a run by itself: from Python and as `rxt eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.damage import flip_bit
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import arguments, checkpoints, evaluations

from data_prep.cli import main as rxt_data
from rxt_dist.cli import main as rxt
from rxt_dist.errors import CheckpointError, ConfigError, DataError
from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

SETTINGS: dict[str, Any] = {
    "batch.lanes": 4,
    "evaluation.max_packs": 2,
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 3,
    "optimizer.warmup_steps": 0,
    "stages": "[{name: joint_lm, steps: 1}, {name: memory_attention, steps: 1}, {name: smat, steps: 2}]",
}


@pytest.fixture(scope="module")
def run(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on 2 ranks."""
    folder = tmp_path_factory.mktemp("evaluated")
    run_ranks(2, arguments(datasets, folder / "run", SETTINGS), folder).check()
    return folder / "run"


@pytest.fixture(scope="module")
def others(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other conversations, sharded with the run's tokenizer and with another one."""
    folder, made = tmp_path_factory.mktemp("others"), datasets.conversations.parent
    corpus = folder / "corpus"
    assert rxt_data(["synth", "--output", str(corpus), "--conversations", "30", "--seed", "77"]) == 0
    found = {}
    for name in ("tokenizer", "other-tokenizer"):
        found[name] = folder / name
        source = ["--input", str(corpus / "conversations.jsonl"), "--tokenizer", str(made / name)]
        assert rxt_data(["shard", "conversations", *source, "--output", str(found[name])]) == 0
    return found


def without_seconds(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("seconds", "stage_index")}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        else:
            assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


def test_a_run_folder_gives_the_evaluation_of_its_last_stage(run: Path) -> None:
    assert_same(evaluate_checkpoint(run), without_seconds(evaluations(run)[2]))


def test_a_checkpoint_folder_is_accepted(run: Path) -> None:
    before, last = checkpoints(run).values()
    assert evaluate_checkpoint(last) == evaluate_checkpoint(run)
    assert_same(evaluate_checkpoint(before), without_seconds(evaluations(run)[1]))


def test_another_stage_can_be_chosen(run: Path) -> None:
    found = evaluate_checkpoint(run, stage_name="joint_lm")
    assert (found["stage"], found["step"]) == ("joint_lm", 4)
    assert {"mlm_loss", "ar_loss", "samples"} <= found.keys()
    assert "memory_loss" in evaluate_checkpoint(run, stage_name="memory_attention")


def test_the_other_split_and_another_dataset_give_other_numbers(run: Path, others: dict[str, Path]) -> None:
    settings = [f"data.conversations={others['tokenizer']}"]
    records = [
        evaluate_checkpoint(run),
        evaluate_checkpoint(run, split="train"),
        evaluate_checkpoint(run, settings, split="train"),
        evaluate_checkpoint(run, [*settings, "evaluation.max_conversations=7"], split="train"),
    ]
    assert [record["split"] for record in records] == ["val", "train", "train", "train"]
    assert len({record["answer_loss"] for record in records}) == 4
    assert records[3]["tokens"] < records[2]["tokens"]


def test_another_tokenizer_is_refused(run: Path, others: dict[str, Path]) -> None:
    """Its ids would mean other words: the message names the dataset and where the tokenizer is."""
    with pytest.raises(ConfigError) as caught:
        evaluate_checkpoint(run, [f"data.conversations={others['other-tokenizer']}"])
    message = str(caught.value)
    assert "data.conversations" in message
    assert str(others["other-tokenizer"]) in message
    assert str(checkpoints(run)[4]) in message


def test_a_stage_the_run_does_not_have_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate_checkpoint(run, stage_name="interaction_sft")
    message = str(caught.value)
    assert "--stage: found 'interaction_sft'" in message
    assert "joint_lm, memory_attention, smat" in message


def test_folders_that_are_no_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for path in (tmp_path / "nowhere", tmp_path, run / "checkpoints"):
        with pytest.raises(CheckpointError, match=str(path)):
            evaluate_checkpoint(path)


def test_a_damaged_checkpoint_is_passed_over_or_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    damaged = checkpoints(copy)[4]
    flip_bit(next((damaged / "tensors").glob("*.distcp")))
    assert evaluate_checkpoint(copy)["step"] == 2
    with pytest.raises(CheckpointError, match="damaged"):
        evaluate_checkpoint(damaged)


def test_a_dataset_that_is_missing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        evaluate_checkpoint(run, [f"data.conversations={tmp_path / 'nothing'}"])


class TestMemory:
    def test_it_is_the_evaluation_of_smat_whatever_stage_the_checkpoint_stands_in(self, run: Path) -> None:
        before, last = checkpoints(run).values()
        found = evaluate_checkpoint(before, memory=True)
        assert (found["stage"], found["step"]) == ("smat", 2)
        assert found["by_interaction"]
        assert evaluate_checkpoint(last, memory=True) == evaluate_checkpoint(run)

    def test_a_run_without_lanes_needs_them(self, datasets: Datasets, tmp_path: Path) -> None:
        own = {"stages": "[{name: joint_lm, steps: 1}]", "batch.lanes": "null", "optimizer.warmup_steps": 0}
        run_ranks(1, arguments(datasets, tmp_path / "run", SETTINGS | own), tmp_path).check()
        with pytest.raises(ConfigError, match=r"batch\.lanes: not set.*--set batch\.lanes=32"):
            evaluate_checkpoint(tmp_path / "run", memory=True)
        found = evaluate_checkpoint(tmp_path / "run", ["batch.lanes=4"], memory=True)
        assert found["stage"] == "smat"
        with pytest.raises(ConfigError, match=r"data\.conversations: not set"):
            evaluate_checkpoint(tmp_path / "run", ["batch.lanes=4", "data.conversations=null"], memory=True)

    def test_conversations_longer_than_those_of_the_training(
        self, run: Path, datasets: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Every interaction has a row, and the files hold what is printed."""
        corpus, dataset = tmp_path / "corpus", tmp_path / "long"
        options = ["--conversations", "12", "--stories", "0", "--min-interactions", "11"]
        assert rxt_data(["synth", "--output", str(corpus), *options, "--max-interactions", "14"]) == 0
        tokenizer = str(datasets.conversations.parent / "tokenizer")
        source = ["--input", str(corpus / "conversations.jsonl"), "--tokenizer", tokenizer]
        assert rxt_data(["shard", "conversations", *source, "--output", str(dataset)]) == 0
        capsys.readouterr()
        output = tmp_path / "results" / "long"
        options = ["--memory", "--split", "train", "--output", str(output)]
        assert rxt(["eval", str(run), *options, "--set", f"data.conversations={dataset}"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert 11 <= len(record["by_interaction"]) <= 14
        assert all(row["true"]["tokens"] > 0 for row in record["by_interaction"])
        assert json.loads((output / "evaluation.json").read_text()) == record
        assert (output / "memory.png").read_bytes().startswith(b"\x89PNG")

    def test_an_output_that_cannot_be_made(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        assert rxt(["eval", str(run), "--memory", "--output", str(tmp_path / "file" / "folder")]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"error: --output: folder {tmp_path / 'file' / 'folder'}")
        assert len(printed.err.splitlines()) == 1


class TestCommand:
    def test_it_prints_json(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rxt(["eval", str(run)]) == 0
        assert_same(json.loads(capsys.readouterr().out), without_seconds(evaluations(run)[2]))

    def test_its_options_reach_the_evaluation(
        self, run: Path, others: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ["--stage", "memory_attention", "--split", "train"]
        limit = "evaluation.max_conversations=7"
        settings = ["--set", f"data.conversations={others['tokenizer']}", "--set", limit]
        assert rxt(["eval", str(run), *options, *settings]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["stage"], found["split"]) == ("memory_attention", "train")

    @pytest.mark.parametrize(
        "mistake",
        ["no run", "unknown stage", "wrong value", "unknown key", "other tokenizer", "not a pair"],
    )
    def test_mistakes_are_one_line_and_exit_code_2(
        self, run: Path, others: dict[str, Path], mistake: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options, fragment = {
            "no run": ([str(run / "nothing")], "nothing"),
            "unknown stage": ([str(run), "--stage", "rl"], "'rl'"),
            "wrong value": ([str(run), "--set", "batch.lanes=many"], "batch.lanes"),
            "unknown key": ([str(run), "--set", "batch.lane=4"], "batch.lanes"),
            "other tokenizer": (
                [str(run), "--set", f"data.conversations={others['other-tokenizer']}"],
                "tokenizer",
            ),
            "not a pair": ([str(run), "--set", "batch.lanes"], "batch.lanes"),
        }[mistake]
        assert rxt(["eval", *options]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert fragment in printed.err
        assert len(printed.err.splitlines()) == 1
