"""Everything a user can get wrong: exit code 2, one sentence, nothing left behind."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep import shard
from rxt_dist.errors import DataError

Run = Callable[..., tuple[int, str, str]]
GOOD_TEXT = json.dumps({"text": "fine"})
GOOD_CONVERSATION = json.dumps({"interactions": [{"query": "q", "answer": "a"}]})


def interaction(**fields: Any) -> str:
    return json.dumps(
        {"interactions": [{"query": "q", "answer": "a"}, {"query": "q", "answer": "abc", **fields}]}
    )


BAD_RECORDS = [
    ("text", "{broken", "line 2: not JSON"),
    ("text", "[1, 2]", r"line 2: a record must be a JSON object, not \[1, 2\]"),
    ("text", "null", "line 2: a record must be a JSON object, not None"),
    ("text", "[" * 100_000, "line 2: not JSON"),
    ("text", '{"title": "x"}', "line 2: the record has no `text`"),
    ("text", GOOD_CONVERSATION, "line 2: the record has no `text`"),
    ("text", '{"text": 5}', "line 2: `text` of the record must be a string, not 5"),
    ("text", '{"text": null}', "line 2: `text` of the record must be a string, not None"),
    ("text", '{"text": ""}', "line 2: `text` of the record is empty"),
    (
        "text",
        '{"text": "a\\ud800b"}',
        "line 2: `text` of the record has an unpaired surrogate at character 1",
    ),
    ("text", '{"text": "a", "id": [1]}', "line 2: `id` must be a string or an integer"),
    ("text", b'{"text": "\xff\xfe"}', "line 2: not UTF-8"),
    ("conversations", GOOD_TEXT, "line 2: the conversation has no interactions"),
    ("conversations", '{"interactions": []}', "line 2: the conversation has no interactions"),
    ("conversations", '{"interactions": {}}', "line 2: `interactions` must be a list"),
    ("conversations", '{"interactions": ["hi"]}', "line 2: interaction 1 must be an object"),
    ("conversations", '{"interactions": [{"query": "q"}]}', "line 2: interaction 1 has no `answer`"),
    ("conversations", '{"interactions": [{"answer": "a"}]}', "line 2: interaction 1 has no `query`"),
    ("conversations", '{"query": "q", "interactions": []}', "line 2: the record has no `answer`"),
    ("conversations", interaction(answer=""), "line 2: `answer` of interaction 2 is empty"),
    ("conversations", interaction(query=""), "line 2: `query` of interaction 2 is empty"),
    (
        "conversations",
        interaction(answer=None),
        "line 2: `answer` of interaction 2 must be a string, not None",
    ),
    ("conversations", interaction(marks="x"), "line 2: `marks` of interaction 2 must be a list"),
    ("conversations", interaction(marks=[{"start": 0}]), "line 2: a mark of interaction 2"),
    ("conversations", interaction(marks=[{"start": 1, "end": 1, "distance": 1}]), "line 2: a mark of"),
    ("conversations", interaction(marks=[{"start": 0, "end": 4, "distance": 1}]), "end <= 3"),
    ("conversations", interaction(marks=[{"start": 0, "end": 1, "distance": 0}]), "distance >= 1"),
    ("conversations", interaction(marks=[{"start": True, "end": 1, "distance": 1}]), "integers"),
    (
        "conversations",
        '{"system": 1, "query": "q", "answer": "a"}',
        "`system` of the record must be a string",
    ),
    ("conversations", '{"system": "", "query": "q", "answer": "a"}', "`system` of the record is empty"),
]


def shard_command(kind: str, source: Path, tokenizer: Path, output: Path, *extra: object) -> list[object]:
    return [
        "shard",
        kind,
        "--input",
        source,
        "--tokenizer",
        tokenizer,
        "--output",
        output,
        "--workers",
        1,
        *extra,
    ]


def assert_refused(result: tuple[int, str, str], message: str, folder: Path, kept: set[str]) -> None:
    import re

    code, output, error = result
    assert code == 2
    assert output == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert {path.name for path in folder.iterdir()} == kept


@pytest.mark.parametrize(("kind", "line", "message"), BAD_RECORDS)
def test_bad_records(
    run: Run, tokenizer_folder: Path, tmp_path: Path, kind: str, line: str | bytes, message: str
) -> None:
    good = GOOD_TEXT if kind == "text" else GOOD_CONVERSATION
    bad = line.encode() if isinstance(line, str) else line
    (tmp_path / "in.jsonl").write_bytes(good.encode() + b"\n" + bad + b"\n" + good.encode() + b"\n")
    result = run(*shard_command(kind, tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "out"))
    assert_refused(result, message, tmp_path, {"in.jsonl"})
    assert str(tmp_path / "in.jsonl") in result[2]


def test_bad_records_in_a_worker_process(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text((GOOD_TEXT + "\n") * 600 + "{broken\n" + (GOOD_TEXT + "\n") * 600)
    command = shard_command("text", tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "out", "--workers", 2)
    assert_refused(run(*command), r"in\.jsonl: line 601: not JSON", tmp_path, {"in.jsonl"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"a,b", r"unknown extension; known are \.txt \.txt\.gz"),
        ("in.jsonl", b"", "the corpus is empty"),
        ("in.jsonl", b"\n \n", "the corpus is empty"),
        ("in.txt", b"", "the corpus is empty"),
        ("in.txt", b"\n<|endoftext|>\n\n<|endoftext|>\n", "the corpus is empty"),
        ("in.txt", b"fine\n<|endoftext|>\nbad \xff", r"in\.txt: line 3: not UTF-8"),
        ("in.jsonl.gz", b"not gzip", r"in\.jsonl\.gz: line 1: cannot read on"),
        (
            "in.jsonl.gz",
            gzip.compress((GOOD_TEXT + "\n").encode() * 99, mtime=0)[:-20],
            r"\.gz: line \d+: cannot read on",
        ),
        ("in.jsonl.zst", b"not zstd", r"\.zst: line 1: cannot read on"),
        ("in.jsonl.zst", zstandard.compress(GOOD_TEXT.encode())[:-2], r"\.zst: line 1: cannot read on"),
        ("in.parquet", b"PAR1", r"\.parquet: row 1: cannot read on"),
    ],
)
def test_bad_files(
    run: Run, tokenizer_folder: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = run(*shard_command("text", tmp_path / name, tokenizer_folder, tmp_path / "out"))
    assert_refused(result, message, tmp_path, {name})


def test_a_missing_input_file(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    result = run(*shard_command("text", tmp_path / "no.jsonl", tokenizer_folder, tmp_path / "out"))
    assert_refused(result, r"input file .*no\.jsonl does not exist", tmp_path, set())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(GOOD_TEXT + "\n")
    return path


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workers", 0, "--workers is 0; it must be at least 1"),
        ("--val-fraction", 1.0, r"--val-fraction is 1\.0; it must be at least 0 and below 1"),
        ("--val-fraction", -0.1, "--val-fraction is -0.1"),
        ("--val-fraction", "nan", "--val-fraction is nan"),
        ("--max-tokens", 7, "--max-tokens is 7; it must be at least 8"),
        ("--split-documents", 7, "--split-documents is 7; it must be at least 8"),
        ("--shard-bytes", 100, "--shard-bytes is 100; it must be at least 10240"),
        ("--block-documents", 0, "--block-documents is 0; it must be at least 1"),
        ("--workers", "two", "invalid int value: 'two'"),
    ],
)
def test_bad_options(
    run: Run, tokenizer_folder: Path, source: Path, tmp_path: Path, option: str, value: object, message: str
) -> None:
    result = run(*shard_command("text", source, tokenizer_folder, tmp_path / "out", option, value))
    assert_refused(result, message, tmp_path, {"in.jsonl"})


def test_split_documents_excludes_max_tokens_and_conversations(
    run: Run, tokenizer_folder: Path, source: Path, tmp_path: Path
) -> None:
    both = ("--split-documents", 16, "--max-tokens", 16)
    result = run(*shard_command("text", source, tokenizer_folder, tmp_path / "out", *both))
    assert_refused(result, "--split-documents and --max-tokens exclude each other", tmp_path, {"in.jsonl"})
    result = run(*shard_command("conversations", source, tokenizer_folder, tmp_path / "out", *both[:2]))
    assert_refused(result, "--split-documents is for text", tmp_path, {"in.jsonl"})


def test_a_folder_without_a_tokenizer(run: Run, source: Path, tmp_path: Path) -> None:
    result = run(*shard_command("text", source, tmp_path, tmp_path / "out"))
    assert_refused(result, r"has no tokenizer\.json", tmp_path, {"in.jsonl"})


def test_a_tokenizer_without_special_tokens(run: Run, source: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    (tmp_path / "tok").mkdir()
    Tokenizer(models.BPE({"a": 0, "[BOS]": 1}, [])).save(str(tmp_path / "tok" / "tokenizer.json"))
    result = run(*shard_command("text", source, tmp_path / "tok", tmp_path / "out"))
    assert_refused(result, r"lacks the special tokens \[PAD\] \[UNK\] \[EOS\]", tmp_path, {"in.jsonl", "tok"})


def test_an_existing_output_folder_is_refused_untouched(
    run: Run, tokenizer_folder: Path, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    result = run(*shard_command("text", source, tokenizer_folder, tmp_path / "out"))
    assert_refused(result, "out exists and is not empty", tmp_path, {"in.jsonl", "out"})
    assert (tmp_path / "out" / "precious").read_text() == "keep"
    result = run(*shard_command("text", source, tokenizer_folder, source))
    assert_refused(result, r"in\.jsonl exists and is not empty", tmp_path, {"in.jsonl", "out"})


@pytest.mark.parametrize(("name", "package"), [("in.parquet", "pyarrow"), ("in.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named(
    run: Run, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    result = run(*shard_command("text", tmp_path / name, tokenizer_folder, tmp_path / "out"))
    assert_refused(result, rf"needs {package}: pip install rxt-dist\[prep\]", tmp_path, {name})


def test_a_dead_worker_is_reported(
    tokenizer_folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "write_part_in_worker", exit_worker)
    options = shard.ShardOptions(
        kind="text", inputs=[source], tokenizer=tokenizer_folder, output=tmp_path / "out", workers=2
    )
    with pytest.raises(DataError, match="a worker process ended unexpectedly"):
        shard.build_dataset(options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def exit_worker(*_: object) -> None:
    import os

    os._exit(9)


def test_verify_tells_damage_from_nonsense(
    run: Run, tokenizer_folder: Path, source: Path, tmp_path: Path
) -> None:
    assert run(*shard_command("text", source, tokenizer_folder, tmp_path / "out"))[0] == 0
    (tmp_path / "out" / "train" / "rxt-train-000000.tar").unlink()
    code, output, _ = run("verify", tmp_path / "out")
    assert code == 1
    assert output == f"{tmp_path / 'out' / 'train' / 'rxt-train-000000.tar'} is missing\n"
    (tmp_path / "out" / "manifest.json").unlink()
    assert run("verify", tmp_path / "out")[0] == 1
    code, _, error = run("verify", tmp_path / "nowhere")
    assert code == 2
    assert "no such folder" in error
    assert run("stats", tmp_path / "out")[0] == 2


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("shard", "images"), ("verify",), ("tokenizer", "--input")]
)
def test_a_wrong_command_line_is_one_sentence(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, error = run(*arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
