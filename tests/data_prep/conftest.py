"""A small mixed corpus, a tokenizer for it, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prep_corpus import CONVERSATIONS, STORIES, write_jsonl

from data_prep.cli import main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "stories.jsonl", STORIES)
    write_jsonl(folder / "conversations.jsonl", CONVERSATIONS)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path) -> Path:
    folder = corpus / "tokenizer"
    inputs = ["--input", str(corpus / "stories.jsonl"), "--input", str(corpus / "conversations.jsonl")]
    assert main(["tokenizer", *inputs, "--vocab-size", "400", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `rxt-data` in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
