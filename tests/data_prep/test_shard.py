"""Building datasets: content, determinism, splits, truncation, marks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from prep_corpus import CONVERSATIONS, STORIES, write_jsonl

from data_prep.encode import truncated_lengths
from data_prep.inputs import InputReader
from data_prep.shard import ShardOptions, build_dataset
from data_prep.sources import resolve_inputs
from rxt_dist.data.format import ConversationTokens, ShardIndex, read_block
from rxt_dist.data.manifest import Manifest, load_manifest
from rxt_dist.data.tokens import load_tokenizer
from rxt_dist.data.verify import verify_dataset

Run = Callable[..., tuple[int, str, str]]
BOS, EOS, QUERY, ANSWER = 2, 3, 5, 6


def documents(folder: Path, split: str) -> Iterator[Any]:
    for shard in load_manifest(folder).shards:
        if shard.split == split:
            index = ShardIndex.read(shard.index_path_in(folder))
            data = shard.path_in(folder).read_bytes()
            for number in range(len(index.blocks)):
                block = read_block(data, index, number)
                for i in range(block.num_documents):
                    yield block.document(i)


def build(kind: Any, inputs: Path | list[Path], tokenizer: Path, output: Path, **options: Any) -> Manifest:
    paths = inputs if isinstance(inputs, list) else [inputs]
    manifest = build_dataset(
        ShardOptions(kind=kind, inputs=paths, tokenizer=tokenizer, output=output, **options)
    )
    assert verify_dataset(output, deep=True) == []
    return manifest


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def decoded_texts(folder: Path, split: str = "train") -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = []
    for ids in documents(folder, split):
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert min(ids[1:-1]) > 10
        found.append(tokenizer.decode(ids[1:-1].tolist()))
    return found


def test_every_text_survives(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    manifest = build(
        "text",
        corpus / "stories.jsonl",
        tokenizer_folder,
        tmp_path / "d",
        val_fraction=0.0,
        shard_bytes=10_240,
    )
    assert decoded_texts(tmp_path / "d") == [story["text"] for story in STORIES]
    assert manifest.counts["train"].documents == len(STORIES)
    assert manifest.counts["val"].documents == 0
    assert manifest.shards_of("val") == []


def test_every_conversation_survives(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    source = corpus / "conversations.jsonl"
    manifest = build("conversations", source, tokenizer_folder, tmp_path / "d", val_fraction=0.0)
    tokenizer = load_tokenizer(tokenizer_folder)
    interactions = 0
    for found, record in zip(documents(tmp_path / "d", "train"), CONVERSATIONS, strict=True):
        segments = [segment.tolist() for segment in found.segments]
        if "system" in record:
            assert found.roles[0] == 0
            system = segments.pop(0)
            assert system[0] == BOS
            assert tokenizer.decode(system[1:]) == record["system"]
        pairs = [record] if "query" in record else []
        pairs += record["interactions"]
        interactions += len(pairs)
        for i, pair in enumerate(pairs):
            query, answer = segments[2 * i], segments[2 * i + 1]
            assert query[:2] == [BOS, QUERY]
            assert tokenizer.decode(query[2:]) == pair["query"]
            assert (answer[0], answer[-1]) == (ANSWER, EOS)
            assert tokenizer.decode(answer[1:-1]) == pair["answer"]
            assert min(query[2:] + answer[1:-1]) > 10
        assert len(segments) == 2 * len(pairs)
    assert manifest.counts["train"].interactions == interactions


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_output_does_not_depend_on_workers_or_place(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, kind: str
) -> None:
    source = corpus / ("stories.jsonl" if kind == "text" else "conversations.jsonl")
    paths = [write_jsonl(tmp_path / "many.jsonl", [json.loads(line) for line in source.open()] * 10), source]
    options = {"val_fraction": 0.2, "shard_bytes": 10_240}
    one = build(kind, paths, tokenizer_folder, tmp_path / "one", **options)
    assert one.counts["train"].documents > 256  # more than one chunk
    assert len(one.shards_of("train")) > 1
    assert len(one.split_indices) == 2
    for workers, part_bytes in ((1, 16 << 20), (1, 4000), (2, 4000), (3, 1500)):
        folder = tmp_path / "deep" / f"{workers}-{part_bytes}"
        build(kind, paths, tokenizer_folder, folder, workers=workers, part_bytes=part_bytes, **options)
        assert files(folder) == files(tmp_path / "one")


def test_every_shard_is_readable_by_stock_webdataset(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for kind, source in (("text", "stories.jsonl"), ("conversations", "conversations.jsonl")):
        folder = tmp_path / kind
        manifest = build(
            kind,
            corpus / source,
            tokenizer_folder,
            folder,
            block_documents=4,
            shard_bytes=20_480,
            val_fraction=0.1,
        )
        assert len(manifest.shards_of("train")) > 1
        for shard in manifest.shards:
            samples = list(webdataset.WebDataset(str(shard.path_in(folder)), shardshuffle=False))
            assert len(samples) == shard.blocks
            for sample in samples:
                assert "tokens.bin" in sample
                assert {"lens.bin"} <= sample.keys() or {
                    "turns.bin",
                    "roles.bin",
                    "convs.bin",
                } <= sample.keys()


def test_the_split_follows_the_id(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """A document stays in its split when others are added or its text changes."""
    records = [{"id": f"doc-{i}", "text": f"text {i}"} for i in range(100)]
    few = build("text", write_jsonl(tmp_path / "a.jsonl", records[:60]), tokenizer_folder, tmp_path / "few",
                val_fraction=0.3)  # fmt: skip
    changed = [{"id": r["id"], "text": r["text"] + " more"} for r in records]
    build(
        "text",
        write_jsonl(tmp_path / "b.jsonl", changed),
        tokenizer_folder,
        tmp_path / "many",
        val_fraction=0.3,
    )
    held_out = {text + " more" for text in decoded_texts(tmp_path / "few", "val")}
    assert 5 < len(held_out) < 35
    assert held_out <= set(decoded_texts(tmp_path / "many", "val"))
    assert few.counts["val"].documents == len(held_out)
    assert not held_out & set(decoded_texts(tmp_path / "many", "train"))


def test_equal_texts_without_id_share_a_split(tokenizer_folder: Path, tmp_path: Path) -> None:
    records = [{"text": f"text {i % 50}"} for i in range(200)]
    build(
        "text", write_jsonl(tmp_path / "a.jsonl", records), tokenizer_folder, tmp_path / "d", val_fraction=0.3
    )
    assert not set(decoded_texts(tmp_path / "d", "val")) & set(decoded_texts(tmp_path / "d", "train"))


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_two_documents_fill_both_splits(tokenizer_folder: Path, tmp_path: Path, fraction: float) -> None:
    records = [{"text": "one"}, {"text": "two"}]
    manifest = build(
        "text",
        write_jsonl(tmp_path / "a.jsonl", records),
        tokenizer_folder,
        tmp_path / "d",
        val_fraction=fraction,
    )
    assert [manifest.counts[split].documents for split in ("train", "val")] == [1, 1]
    assert sorted(decoded_texts(tmp_path / "d") + decoded_texts(tmp_path / "d", "val")) == ["one", "two"]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.999999])
def test_a_single_document_is_for_training(tokenizer_folder: Path, tmp_path: Path, fraction: float) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    manifest = build("text", source, tokenizer_folder, tmp_path / "d", val_fraction=fraction)
    assert decoded_texts(tmp_path / "d") == ["one"]
    assert manifest.counts["val"].documents == 0


def test_long_documents_are_truncated_and_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = "abcdefghij" * 20
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": "short"}])
    manifest = build("text", source, tokenizer_folder, tmp_path / "d", val_fraction=0.0, max_tokens=16)
    long, short = documents(tmp_path / "d", "train")
    tokenizer = load_tokenizer(tokenizer_folder)
    assert len(long) == 16
    assert (long[0], long[-1]) == (BOS, EOS)
    assert text.startswith(tokenizer.decode(long[1:-1].tolist()))
    assert tokenizer.decode(short[1:-1].tolist()) == "short"
    assert (manifest.counts["train"].truncated, manifest.max_tokens) == (1, 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_long_documents_are_split_without_losing_a_token(
    tokenizer_folder: Path, tmp_path: Path, workers: int
) -> None:
    """14 tokens of text a piece: below, at and above the limits of one and of two pieces, and many."""
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = ["0" * n for n in (1, 13, 14, 15, 28, 29, 500)]
    expected = [tokenizer.encode(text).ids for text in texts]
    pieces = [ids[start : start + 14] for ids in expected for start in range(0, len(ids), 14)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    options = {"val_fraction": 0.0, "split_documents": 16, "workers": workers}
    manifest = build("text", source, tokenizer_folder, tmp_path / "d", **options)
    found = [ids.tolist() for ids in documents(tmp_path / "d", "train")]
    assert found == [[BOS, *piece, EOS] for piece in pieces]
    counts = manifest.counts["train"]
    long = [ids for ids in expected if len(ids) > 14]
    assert 1 < len(long) < len(expected)
    assert (counts.documents, counts.truncated) == (len(pieces), 0)
    assert counts.split == sum(-(-len(ids) // 14) for ids in long)
    assert manifest.split_documents == 16


def test_pieces_are_held_out_one_by_one(tokenizer_folder: Path, tmp_path: Path) -> None:
    """One long document fills both splits; nothing of it is lost or repeated, with any number of workers."""
    text = " ".join(str(number) for number in range(3000))
    records = [{"id": "book", "text": text}, *({"text": f"short {i}"} for i in range(300))]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"val_fraction": 0.25, "split_documents": 32}
    manifest = build("text", source, tokenizer_folder, tmp_path / "d", **options)
    build("text", source, tokenizer_folder, tmp_path / "e", workers=2, **options)
    assert files(tmp_path / "d") == files(tmp_path / "e")
    ids = load_tokenizer(tokenizer_folder).encode(text).ids
    pieces = sorted(tuple(ids[start : start + 30]) for start in range(0, len(ids), 30))
    found = {
        split: [tuple(d[1:-1].tolist()) for d in documents(tmp_path / "d", split)]
        for split in ("train", "val")
    }
    wanted = set(pieces)
    assert sorted(p for part in found.values() for p in part if p in wanted) == pieces
    held_out = sum(piece in wanted for piece in found["val"])
    assert 0.15 * len(pieces) < held_out < 0.35 * len(pieces)
    assert manifest.counts["val"].split == held_out
    assert manifest.counts["train"].split == len(pieces) - held_out


def test_long_interactions_are_truncated_from_the_longer_side(tokenizer_folder: Path, tmp_path: Path) -> None:
    long = "0123456789" * 5  # digits were never merged much: many tokens
    record = {
        "system": long,
        "interactions": [
            {"query": long, "answer": "ok"},
            {"query": "ok", "answer": long},
            {"query": long, "answer": long},
            {"query": "ok", "answer": "ok"},
        ],
    }
    source = write_jsonl(tmp_path / "a.jsonl", [record])
    manifest = build("conversations", source, tokenizer_folder, tmp_path / "d", max_tokens=20)
    (found,) = documents(tmp_path / "d", "train")
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode(long).ids
    ok = tokenizer.encode("ok").ids
    segments = [segment.tolist() for segment in found.segments]
    room = 20 - len(ok) - 2
    assert segments[0] == [BOS, *ids][:20]
    assert segments[1:3] == [[BOS, QUERY, *ids][:room], [ANSWER, *ok, EOS]]
    assert segments[3:5] == [[BOS, QUERY, *ok], [ANSWER, *[*ids, EOS][-(room - 1) :]]]
    assert segments[5:7] == [[BOS, QUERY, *ids][:10], [ANSWER, *[*ids, EOS][-9:]]]
    assert segments[7:] == [[BOS, QUERY, *ok], [ANSWER, *ok, EOS]]
    assert manifest.counts["train"].truncated == 4  # the system text and three interactions


@pytest.mark.parametrize(
    ("query", "answer", "limit", "expected"),
    [(5, 5, None, (5, 5)), (5, 5, 10, (5, 5)), (5, 6, 10, (5, 5)), (9, 3, 10, (7, 3)), (3, 9, 10, (3, 7)),
     (50, 60, 11, (5, 6)), (5, 60, 11, (5, 6)), (60, 6, 11, (5, 6)), (60, 5, 11, (6, 5))],
)  # fmt: skip
def test_truncated_lengths(query: int, answer: int, limit: int | None, expected: tuple[int, int]) -> None:
    assert truncated_lengths(query, answer, limit) == expected


def test_marks_become_token_marks(tokenizer_folder: Path, tmp_path: Path) -> None:
    answer = "the — fox is Käse."
    start = answer.index("fox")
    records = [
        {"interactions": [{"query": "q", "answer": answer, "marks": [
            {"start": start, "end": start + 3, "distance": 2}, {"start": 13, "end": 17, "distance": 300}]}]},
        {"interactions": [{"query": "plain", "answer": "plain"}]},
    ]  # fmt: skip
    source = write_jsonl(tmp_path / "a.jsonl", records)
    build("conversations", source, tokenizer_folder, tmp_path / "d", val_fraction=0.0)
    tokenizer = load_tokenizer(tokenizer_folder)
    marked, plain = documents(tmp_path / "d", "train")
    assert isinstance(marked, ConversationTokens)
    assert marked.marks is not None
    assert not marked.marks[0].any()
    tokens, marks = marked.segments[1], marked.marks[1]
    assert tokenizer.decode(tokens[1:-1].tolist()) == answer
    assert tokenizer.decode([int(t) for t, m in zip(tokens, marks, strict=True) if m == 2]).strip() == "fox"
    assert (
        tokenizer.decode([int(t) for t, m in zip(tokens, marks, strict=True) if m == 255]).strip() == "Käse"
    )
    assert (marks[0], marks[-1]) == (0, 0)
    assert plain.marks is None or not any(m.any() for m in plain.marks)


def test_marks_survive_truncation_of_their_answer(tokenizer_folder: Path, tmp_path: Path) -> None:
    answer = "0123456789" * 5 + " fox"
    mark = {"start": 51, "end": 54, "distance": 1}
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"interactions": [{"query": "q", "answer": answer, "marks": [mark]}]}]
    )
    build("conversations", source, tokenizer_folder, tmp_path / "d", max_tokens=12)
    (found,) = documents(tmp_path / "d", "train")
    tokenizer = load_tokenizer(tokenizer_folder)
    marked = [int(t) for t, m in zip(found.segments[1], found.marks[1], strict=True) if m]
    assert tokenizer.decode(marked).strip() == "fox"


def test_conversations_from_parquet(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"system": None, "interactions": [{"query": "a", "answer": "b"}, {"query": "c", "answer": "d"}]},
        {"system": "be kind", "interactions": [{"query": "e", "answer": "f"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", rows)
    for extension in ("parquet", "jsonl"):
        source = tmp_path / f"a.{extension}"
        build("conversations", source, tokenizer_folder, tmp_path / extension, val_fraction=0.0)
    assert files(tmp_path / "parquet" / "train") == files(tmp_path / "jsonl" / "train")


def test_a_text_file_without_separators_is_one_document(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = "para one\n\npara <|endoftext|> two\n\n\npara three\n"
    (tmp_path / "a.txt").write_text(text)
    build("text", tmp_path / "a.txt", tokenizer_folder, tmp_path / "d")
    assert decoded_texts(tmp_path / "d") == [text]


def test_inputs_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "x" * 10_000}] * 1000)
    chunks = InputReader(resolve_inputs([path]), tmp_path).chunks()
    first, _ = next(chunks)
    assert first.size < 1.1 * 2**20
    assert sum(len(chunk.records) for chunk, _ in chunks) > 800


def test_the_manifest_describes_the_sources(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    manifest = build("text", corpus / "stories.jsonl", tokenizer_folder, tmp_path / "d")
    (source,) = manifest.source
    assert (source.name, source.bytes) == ("stories.jsonl", (corpus / "stories.jsonl").stat().st_size)
    assert manifest.vocab_size == 400
    assert manifest.special_tokens["[MASK]"] == 4
    assert str(tmp_path) not in (tmp_path / "d" / "manifest.json").read_text()


def test_the_command_line_from_end_to_end(
    run: Run, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    arguments = ("--input", corpus / "conversations.jsonl", "--tokenizer", tokenizer_folder)
    command = ["shard", "conversations", *arguments, "--output", tmp_path / "d", "--workers", 2]
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", *map(str, command)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    fingerprint = load_manifest(tmp_path / "d").fingerprint
    assert fingerprint in done.stdout
    assert run("verify", tmp_path / "d")[0] == 0
    assert run("verify", tmp_path / "d", "--deep")[1] == f"{tmp_path / 'd'}: sound\n"
    code, output, _ = run("stats", tmp_path / "d", "--json")
    stats = json.loads(output)
    assert (code, stats["fingerprint"]) == (0, fingerprint)
    train, val = stats["splits"]["train"], stats["splits"]["val"]
    assert train["conversations"] + val["conversations"] == len(CONVERSATIONS)
    assert train["percentiles"]["interactions_per_conversation"]["p100"] == 4
    assert fingerprint in run("stats", tmp_path / "d")[1]
