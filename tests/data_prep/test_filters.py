"""What is left out of a dataset, and what the manifest counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_corpus import write_jsonl
from tokenizers import Tokenizer

from data_prep.records import ConversationRecord, Interaction, TextRecord, content_key
from data_prep.shard import ShardOptions, build_dataset
from rxt_dist.data.format import ShardIndex, read_block
from rxt_dist.data.manifest import Manifest, load_manifest
from rxt_dist.data.tokens import load_tokenizer
from rxt_dist.data.verify import verify_dataset

Run = Callable[..., tuple[int, str, str]]


def build(kind: Any, inputs: list[Path], tokenizer: Path, output: Path, **options: Any) -> Manifest:
    options = {"val_fraction": 0.0, **options}
    manifest = build_dataset(
        ShardOptions(kind=kind, inputs=inputs, tokenizer=tokenizer, output=output, **options)
    )
    assert verify_dataset(output, deep=True) == []
    return manifest


def texts(folder: Path, split: str = "train") -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = []
    for shard in load_manifest(folder).shards_of(split):  # type: ignore[arg-type]
        index, data = ShardIndex.read(shard.index_path_in(folder)), shard.path_in(folder).read_bytes()
        for number in range(len(index.blocks)):
            block = read_block(data, index, number)
            for i in range(block.num_documents):
                document: Any = block.document(i)
                if isinstance(document, np.ndarray):
                    found.append(tokenizer.decode(document[1:-1].tolist()))
                else:
                    found.append(" | ".join(tokenizer.decode(s.tolist()) for s in document.segments))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_repeated_texts_are_dropped_wherever_they_are(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The first one stays, whatever its id, its part of the input and its split."""
    fillers = [{"id": f"f{i}", "text": f"filler {i}"} for i in range(300)]
    records: list[dict[str, Any]] = [
        {"id": "one", "text": "The  Café\nis open."},
        *fillers,
        {"id": "two", "text": "the caf\u0065\u0301 IS open."},
        {"id": "three", "text": " The Café is open. "},
        {"id": "four", "text": "The Café is open!"},
    ]
    first = write_jsonl(tmp_path / "a.jsonl", records)
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "FILLER 7"}, {"text": "only here"}])
    options = {"dedup": True, "val_fraction": 0.3, "part_bytes": 2000}
    manifest = build("text", [first, second], tokenizer_folder, tmp_path / "d", **options)
    found = texts(tmp_path / "d") + texts(tmp_path / "d", "val")
    wanted = ["The  Café\nis open.", *(f"filler {i}" for i in range(300)), "The Café is open!", "only here"]
    assert sorted(found) == sorted(wanted)
    assert manifest.filters.dedup
    assert manifest.filters.dropped == {"short": 0, "long": 0, "duplicate": 3}
    assert [(s.records, s.documents) for s in manifest.source] == [(304, 302), (2, 1)]
    build(
        "text",
        [first, second],
        tokenizer_folder,
        tmp_path / "e",
        **{**options, "workers": 2, "part_bytes": 99},
    )
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_repeated_conversations_are_dropped(tokenizer_folder: Path, tmp_path: Path) -> None:
    turns = [{"query": "Hi there", "answer": "Hello"}, {"query": "Bye", "answer": "Ciao"}]
    records: list[dict[str, Any]] = [
        {"id": "1", "interactions": turns},
        {"id": "2", "interactions": [{"query": " hi  there", "answer": "HELLO"}, turns[1]]},
        {"id": "3", "interactions": turns[:1]},
        {"id": "4", "system": "Hi there", "interactions": [{"query": "Hello", "answer": "Bye"}]},
        {"id": "5", "interactions": turns[::-1]},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    manifest = build("conversations", [source], tokenizer_folder, tmp_path / "d", dedup=True)
    assert manifest.counts["train"].conversations == 4
    assert manifest.filters.dropped["duplicate"] == 1


@given(
    parts=st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=4),
    other=st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=4),
)
def test_keys_tell_different_conversations_apart(parts: list[str], other: list[str]) -> None:
    def record(texts: list[str]) -> ConversationRecord:
        system = texts[0] if len(texts) % 2 else None
        rest = texts[len(texts) % 2 :]
        return ConversationRecord([Interaction(*rest[i : i + 2]) for i in range(0, len(rest), 2)], system)

    def normal(texts: list[str]) -> list[str]:
        import unicodedata

        return [
            " ".join(unicodedata.normalize("NFKC", t).casefold().replace("\0", " ").split()) for t in texts
        ]

    same = content_key(record(parts)) == content_key(record(other))
    assert same == ([p.strip() for p in normal(parts)] == [o.strip() for o in normal(other)])


def test_a_dropped_record_does_not_hide_its_repetition(tokenizer_folder: Path, tmp_path: Path) -> None:
    """White space makes the first one too long; the second is kept."""
    records = [{"text": "a fox" + " \n" * 60 + "b"}, {"text": "a fox b"}, {"text": "A fox b"}]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    manifest = build("text", [source], tokenizer_folder, tmp_path / "d", dedup=True, drop_longer=40)
    assert texts(tmp_path / "d") == ["a fox b"]
    assert manifest.filters.dropped == {"short": 0, "long": 1, "duplicate": 1}


def test_lengths_are_filtered_at_their_exact_limits(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "0" * n} for n in range(1, 40)])
    lengths = {n: len(tokenizer.encode("0" * n).ids) + 2 for n in range(1, 40)}
    options = {"min_tokens": 10, "drop_longer": 20}
    manifest = build("text", [source], tokenizer_folder, tmp_path / "d", **options)
    kept = ["0" * n for n, length in lengths.items() if 10 <= length <= 20]
    assert texts(tmp_path / "d") == kept
    assert {10, 20} <= set(lengths.values())
    short, long = (sum(test(n) for n in lengths.values()) for test in (lambda n: n < 10, lambda n: n > 20))
    assert manifest.filters.dropped == {"short": short, "long": long, "duplicate": 0}
    assert (manifest.filters.min_tokens, manifest.filters.drop_longer) == (10, 20)
    (info,) = manifest.source
    assert (info.records, info.documents, info.tokens) == (39, len(kept), manifest.counts["train"].tokens)


def test_long_records_are_dropped_before_they_are_split_or_truncated(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "0" * 300}, {"text": "1" * 30}])
    for number, options in enumerate(({"split_documents": 16}, {"max_tokens": 16})):
        manifest = build(
            "text", [source], tokenizer_folder, tmp_path / str(number), drop_longer=60, **options
        )
        assert set("".join(texts(tmp_path / str(number)))) == {"1"}
        assert manifest.filters.dropped["long"] == 1


def test_short_rests_of_split_documents_can_be_dropped(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    text = "0" * 31
    ids = tokenizer.encode(text).ids
    assert 0 < len(ids) % 14 < 8 - 2
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    options = {"split_documents": 16, "min_tokens": 8}
    manifest = build("text", [source], tokenizer_folder, tmp_path / "d", **options)
    whole = len(ids) // 14
    assert "".join(texts(tmp_path / "d")) == tokenizer.decode(ids[: 14 * whole])
    assert manifest.counts["train"].documents == manifest.counts["train"].split == whole
    assert manifest.filters.dropped["short"] == 1


def test_conversations_are_filtered_as_a_whole(tokenizer_folder: Path, tmp_path: Path) -> None:
    turn = {"query": "00000", "answer": "11111"}
    source = write_jsonl(tmp_path / "a.jsonl", [{"interactions": [turn] * n} for n in range(1, 8)])
    everything = build("conversations", [source], tokenizer_folder, tmp_path / "all")
    size = everything.counts["train"].tokens // 28
    options = {"min_tokens": 2 * size, "drop_longer": 5 * size}
    manifest = build("conversations", [source], tokenizer_folder, tmp_path / "some", **options)
    assert manifest.counts["train"].interactions == 2 + 3 + 4 + 5
    assert manifest.filters.dropped == {"short": 1, "long": 2, "duplicate": 0}


def test_the_command_line_reports_what_was_dropped(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "some words here"}] * 3 + [{"text": "x"}])
    command = ("shard", "text", "--input", source, "--tokenizer", tokenizer_folder, "--workers", 1)
    options = ("--dedup", "--min-tokens", 5, "--val-fraction", 0)
    code, output, _ = run(*command, *options, "--output", tmp_path / "d")
    assert code == 0
    assert f"{tmp_path / 'd'}: dropped: 1 short, 2 duplicate\n" in output
    code, output, _ = run(*command, "--output", tmp_path / "e")
    assert code == 0
    assert "dropped" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-tokens", 0), "--min-tokens is 0; it must be at least 1"),
        (("--drop-longer", 0), "--drop-longer is 0; it must be at least 1"),
        (("--min-tokens", 9, "--drop-longer", 8), "--drop-longer is 8; it must be at least 9"),
        (("--min-tokens", 17, "--max-tokens", 16), "--min-tokens is 17 but documents have at most 16"),
        (("--min-tokens", 17, "--split-documents", 16), "--min-tokens is 17 but documents have at most 16"),
        (("--min-tokens", 1000), "the corpus is empty: every record was dropped in .*a.jsonl"),
    ],
)
def test_filters_that_leave_nothing(
    run: Run, tokenizer_folder: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    import re

    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}])
    command = ("shard", "text", "--input", source, "--tokenizer", tokenizer_folder, "--workers", 1)
    code, _, error = run(*command, *options, "--output", tmp_path / "d")
    assert code == 2
    assert re.search(message, error), error
    assert not (tmp_path / "d").exists()


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    part_bytes=st.integers(1, 600),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    dedup=st.booleans(),
    minimum=st.sampled_from([None, 6]),
)
def test_the_size_of_parts_does_not_matter(
    tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[int],
    part_bytes: int,
    fraction: float,
    dedup: bool,
    minimum: int | None,
) -> None:
    """Against the rules written down for whole lists, without parts."""
    folder = tmp_path_factory.mktemp("parts")
    records = [
        {"id": str(place), "text": f"{number}" * (1 + number % 9)} for place, number in enumerate(numbers)
    ]
    source = write_jsonl(folder / "a.jsonl", records)
    tokenizer = load_tokenizer(tokenizer_folder)
    wanted, seen = [], set()
    for record in records:
        if minimum and len(tokenizer.encode(record["text"]).ids) + 2 < minimum:
            continue
        if not (dedup and record["text"] in seen):
            wanted.append(record)
        seen.add(record["text"])
    if not wanted:
        return
    hashes = [TextRecord(record["text"], record["id"]).hash for record in wanted]
    held_out = [digest < fraction * 2**64 for digest in hashes]
    if all(held_out):
        held_out[int(np.argmax(np.array(hashes, np.uint64)))] = False
    elif not any(held_out) and fraction > 0 and len(wanted) > 1:
        held_out[int(np.argmin(np.array(hashes, np.uint64)))] = True
    options = {"val_fraction": fraction, "dedup": dedup, "min_tokens": minimum, "part_bytes": part_bytes}
    build("text", [source], tokenizer_folder, folder / "d", **options)
    for split, mine in (("train", False), ("val", True)):
        expected = [record["text"] for record, out in zip(wanted, held_out, strict=True) if out == mine]
        assert texts(folder / "d", split) == expected


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_token_type_at_the_boundary(tokenizer_folder: Path, tmp_path: Path, size: int, dtype: str) -> None:
    """The last id of the vocabulary occurs in the text."""
    import json

    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"unused-{i}": i for i in range(len(vocab), size - 1)}
    vocab["zq"] = size - 1
    content["model"]["merges"].append(["z", "q"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer.from_str(json.dumps(content)).save(str(folder / "tokenizer.json"))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a zq b"}, {"text": "zq"}])
    manifest = build("text", [source], folder, tmp_path / "d")
    assert (manifest.vocab_size, manifest.dtype) == (size, dtype)
    assert texts(tmp_path / "d") == ["a zq b", "zq"]
    (shard,) = manifest.shards
    index = ShardIndex.read(shard.index_path_in(tmp_path / "d"))
    block = read_block(shard.path_in(tmp_path / "d").read_bytes(), index, 0)
    assert block.tokens.dtype.name == dtype
    assert int(block.tokens.max()) == size - 1
