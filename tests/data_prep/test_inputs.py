"""What `--input` can name, and what each of it delivers."""

from __future__ import annotations

import functools
import gzip
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
import zstandard
from prep_corpus import write_jsonl

from data_prep.inputs import InputReader, Position
from data_prep.sources import Source, resolve_inputs
from rxt_dist.data import remote
from rxt_dist.errors import DataError

Run = Callable[..., tuple[int, str, str]]
TEXTS = ["first\ndocument", "second é", "third"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def names(*inputs: str | Path) -> list[str]:
    return [source.name for source in resolve_inputs(inputs)]


def contents(*inputs: str | Path) -> list[Any]:
    """Content of every record; JSON decoded."""
    found: list[Any] = []
    for chunk, _ in InputReader(resolve_inputs(inputs), Path("/nonexistent")).chunks():
        for record in chunk.records:
            content = record.content
            if isinstance(content, bytes):
                content = content.decode() if record.is_text else json.loads(content)
            found.append(content)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/two.jsonl", "a/one.txt", "b/.hidden/x.txt", "three.jsonl.gz", "README.md", "a/four.TXT"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    return tmp_path / "tree"


def test_folders_patterns_and_files(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert names(tree) == ["one.txt", "two.jsonl", "three.jsonl.gz"]
    assert "2 files with other extensions left out" in caplog.text
    assert names(tree / "b" / "two.jsonl") == ["two.jsonl"]
    assert names(f"{tree}/*/*.jsonl") == ["two.jsonl"]
    assert names(f"{tree}/**/*.[tj]*") == ["one.txt", "two.jsonl", "three.jsonl.gz"]
    assert names(f"{tree}/a/*.txt", f"{tree}/b/*.jsonl") == ["one.txt", "two.jsonl"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part[1].jsonl", [{"text": "x"}])
    assert names(tmp_path / "part[1].jsonl") == ["part[1].jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tree}/none.txt", "does not exist"),
        ("{tree}/*.csv", "matches no file"),
        ("{tree}/*.md", "unknown extension; known are .txt"),
        ("{tree}/b/.hidden", None),
        ("{tree}/empty", "has no file with a known extension"),
        ("pipe:cat /etc/passwd", "does not exist"),
        ("wds:{tree}/a/one.txt", r"unknown extension; known are \.tar"),
        ("hf:", "names no dataset"),
        ("nosuchstore://bucket/a.txt", "cannot open the store nosuchstore://"),
        ("memory://nowhere/*.txt", "matches no file"),
        ("file://{tree}/empty", "has no file with a known extension"),
    ],
)
def test_inputs_that_cannot_be(tree: Path, text: str, message: str | None) -> None:
    (tree / "empty").mkdir()
    if message is None:
        assert names(text.format(tree=tree)) == ["x.txt"]
    else:
        with pytest.raises(DataError, match=message):
            resolve_inputs([text.format(tree=tree)])


def test_the_same_file_twice_is_a_mistake(tree: Path) -> None:
    with pytest.raises(DataError, match=r"two\.jsonl is given twice"):
        resolve_inputs([f"{tree}/b/two.jsonl", f"{tree}/**/*.jsonl"])


def test_all_formats_give_the_same_records(tmp_path: Path) -> None:
    joined = "\n<|endoftext|>\n".join(TEXTS).encode()
    zst = zstandard.compress
    made = {
        "a.jsonl": b"\xef\xbb\xbf" + LINES + b"\n\n",
        "b.jsonl.gz": gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]),
        "c.jsonl.zst": zst(LINES[:30]) + zst(LINES[30:].removesuffix(b"\n")),
        "d.txt": joined,
        "e.txt.gz": gzip.compress(joined),
        "f.txt.zst": zst(joined),
    }
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    table = pyarrow.table({"text": TEXTS, "id": [None] * 3, "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "g.parquet")
    for path in sorted(tmp_path.iterdir()):
        found = [c if isinstance(c, str) else c["text"] for c in contents(path)]
        assert found == TEXTS, path.name


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_compressed_file_of_many_reads(tmp_path: Path, compression: str) -> None:
    """More than one buffer of input and of output, lines that span buffers, several frames."""
    import random

    draw = random.Random(0)
    records = [{"text": "".join(draw.choices("abcdefgh ", k=draw.randrange(20_000)))} for _ in range(400)]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    compress = gzip.compress if compression == "gz" else zstandard.compress
    path = tmp_path / f"a.jsonl.{compression}"
    path.write_bytes(compress(data[:777_777]) + compress(data[777_777:777_778]) + compress(data[777_778:]))
    assert path.stat().st_size > 3 << 19
    assert contents(path) == records
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"line \d+: cannot read on"):
        contents(path)


@pytest.mark.parametrize("part_bytes", [1, 100, 500, 10**9])
def test_reading_goes_on_from_any_position(tree: Path, part_bytes: int) -> None:
    sources = resolve_inputs([tree])
    records = [record for chunk, _ in InputReader(sources, tree).chunks() for record in chunk.records]
    assert len(records) == 1 + 3 + 3
    parts = list(InputReader(sources, tree).parts(part_bytes, 0, Position()))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [r for part in parts for chunk in part.chunks for r in chunk.records] == records
    for number, part in enumerate(parts):
        rest = list(InputReader(sources, tree).parts(part_bytes, number + 1, part.end))
        assert rest == parts[number + 1 :]


class _Server(BaseHTTPRequestHandler):
    """Serves files; /flaky fails twice, /short breaks off, /forbidden refuses."""

    requests: list[str]

    def __init__(self, *arguments: Any, files: dict[str, bytes], log: list[str]) -> None:
        self.files, self.seen = files, log
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.seen.append(self.path)
        name = self.path.partition("?")[0].strip("/")
        if name == "forbidden.jsonl":
            self.send_error(403)
        elif name == "flaky.jsonl" and self.seen.count(self.path) < 3:
            self.send_error(503)
        elif (content := self.files.get(name.removeprefix("short-"))) is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name.startswith("short-") else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.01)
    files: dict[str, bytes] = {"flaky.jsonl": LINES}
    seen: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Server, files=files, log=seen)) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", files, seen
        found.shutdown()
        thread.join()


def test_files_of_a_web_server(
    run: Run, server: tuple[str, dict[str, bytes], list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """The same dataset as from local files, each file asked for once, also after a stop in between."""
    url, served, seen = server
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from", "a", "table"]}), table)
    served |= {"a.jsonl.gz": gzip.compress(LINES), "b.parquet": table.getvalue(), "c.txt": b"plain"}
    local = tmp_path / "local"
    local.mkdir()
    for name, content in served.items():
        (local / name).write_bytes(content)
    common = ("--tokenizer", tokenizer_folder, "--workers", 1, "--val-fraction", 0)
    for place, output in ((url, "remote-dataset"), (local, "local-dataset")):
        inputs = [
            ("--input", f"{place}/{name}") for name in ("a.jsonl.gz", "b.parquet", "c.txt", "flaky.jsonl")
        ]
        flat = [argument for pair in inputs for argument in pair]
        code, _, error = run("shard", "text", *flat, *common, "--output", tmp_path / output)
        assert code == 0, error
    remote, here = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("remote-dataset", "local-dataset")
    )
    assert remote == here
    assert seen == ["/a.jsonl.gz", "/b.parquet", "/c.txt", *["/flaky.jsonl"] * 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "local-dataset", "remote-dataset"]


@pytest.mark.parametrize(
    ("name", "message", "requests"),
    [
        ("missing.jsonl", "cannot fetch: 404", 1),
        ("forbidden.jsonl", "cannot fetch: 403", 1),
        ("short-flaky.jsonl", "cannot fetch: .* of .* bytes came", 4),
    ],
)
def test_files_that_a_web_server_does_not_deliver(
    server: tuple[str, dict[str, bytes], list[str]], tmp_path: Path, name: str, message: str, requests: int
) -> None:
    url, _, seen = server
    with pytest.raises(DataError, match=message):
        list(InputReader(resolve_inputs([f"{url}/{name}"]), tmp_path / "downloads").chunks())
    assert len(seen) == requests
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.01)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9/a\.jsonl: cannot fetch"):
        list(InputReader(resolve_inputs(["http://127.0.0.1:9/a.jsonl"]), tmp_path).chunks())


def test_secrets_of_an_address_are_not_shown() -> None:
    (source,) = resolve_inputs(["https://user:word@host.example/data/a.jsonl?key=secret"])
    assert source.shown == "https://host.example/data/a.jsonl"
    assert source.name == "a.jsonl"
    assert source.location.endswith("?key=secret")


def test_stores_of_fsspec(tmp_path: Path) -> None:
    """The memory and the file store stand for the remote ones: files, patterns and folders."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("corpus/b.jsonl", "corpus/a.jsonl", "corpus/deep/c.txt"):
        with memory.open(f"/{name}", "wb") as file:
            file.write(LINES if name.endswith(".jsonl") else b"deep")
    try:
        assert names("memory://corpus/*.jsonl") == ["a.jsonl", "b.jsonl"]
        assert names("memory://corpus") == ["a.jsonl", "b.jsonl", "c.txt"]
        reader = InputReader(resolve_inputs(["memory://corpus"]), tmp_path)
        found = [record.content for chunk, _ in reader.chunks() for record in chunk.records]
        assert found == [*LINES.splitlines(keepends=True)] * 2 + [b"deep"]
        with pytest.raises(DataError, match="cannot fetch"):
            list(InputReader(resolve_inputs(["memory://corpus/none.txt"]), tmp_path).chunks())
    finally:
        memory.rm("/corpus", recursive=True)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    assert resolve_inputs([f"file://{tmp_path}/a.jsonl"])[0].is_remote
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Shards as the webdataset package writes them: documents, objects, and members of no interest."""
    folder = tmp_path / "samples"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as writer:
        writer.write({"__key__": "000", "txt": "a text", "jpg": b"\xff\xd8"})
        writer.write({"__key__": "sub/001", "json": {"text": "an object"}})
        writer.write({"__key__": "002", "cls": 5})
    with webdataset.TarWriter(str(folder / "1.tar.gz"), compress=True) as writer:
        writer.write({"__key__": "003", "jsonl": b'{"text": "one line"}\n'})
        writer.write({"__key__": "003.v2", "txt": "dots"})
    return folder


def test_webdataset_shards_of_others(samples: Path) -> None:
    found = contents(f"wds:{samples}/*.tar*")
    assert found == ["a text", {"text": "an object"}, {"text": "one line"}]
    assert contents(f"wds:{samples}") == found
    assert contents(f"wds:{samples}/0.tar") == found[:2]


@pytest.mark.parametrize("conversations", [True, False])
def test_webdataset_samples_become_documents(
    run: Run, tokenizer_folder: Path, tmp_path: Path, conversations: bool
) -> None:
    record = {"interactions": [{"query": "q", "answer": "a"}]} if conversations else {"text": "t"}
    with webdataset.TarWriter(str(tmp_path / "in.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:03d}", "json": record})
    kind = "conversations" if conversations else "text"
    code, output, error = run(
        "shard", kind, "--input", f"wds:{tmp_path}/in.tar", "--tokenizer", tokenizer_folder,
        "--output", tmp_path / "d", "--val-fraction", 0, "--workers", 1,
    )  # fmt: skip
    assert code == 0, error
    assert "train: 5 documents" in output


def damaged_tar(path: Path, *, cut: int | None = None, zero: int | None = None) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(4):
            add(tar, f"{number}.txt", b"x" * 700)  # 512 of header and 1024 of content each
    content = bytearray(path.read_bytes())
    if zero is not None:
        content[zero : zero + 200] = bytes(200)
    path.write_bytes(content[:cut])
    return path


@pytest.mark.parametrize(
    "damage",
    [
        {"cut": 2 * 1536},  # at a member boundary
        {"cut": 2 * 1536 + 100},  # inside a header
        {"cut": 2 * 1536 + 800},  # inside a payload
        {"zero": 2 * 1536},  # a header zeroed in part
        {"cut": 0},
    ],
)
def test_damaged_webdataset_shards_are_refused(tmp_path: Path, damage: dict[str, int]) -> None:
    path = damaged_tar(tmp_path / "a.tar", **damage)
    with pytest.raises(DataError, match=r"a\.tar: after sample .*: cannot read on"):
        contents(f"wds:{path}")


def test_ambiguous_and_oversized_samples_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/7.txt", b"text")
        add(tar, "x/7.json", b"{}")
    with pytest.raises(DataError, match=r"sample x/7 has \.txt and \.json; it must have one of"):
        contents(f"wds:{tmp_path}/a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        member = tarfile.TarInfo("0.txt")
        member.size = 1 << 33
        tar.addfile(member)
    with pytest.raises(DataError, match=r"member 0\.txt claims 8589934592 bytes"):
        contents(f"wds:{tmp_path}/b.tar")


def test_bad_records_name_their_sample(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/good.json", b'{"text": "fine"}')
        add(tar, "x/bad.json", b"{broken")
    code, _, error = run(
        "shard", "text", "--input", f"wds:{tmp_path}/a.tar", "--tokenizer", tokenizer_folder,
        "--output", tmp_path / "d", "--workers", 1,
    )  # fmt: skip
    assert code == 2
    assert "a.tar: sample x/bad: not JSON" in error


def test_hugging_face_datasets(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    import datasets

    rows = {"text": [f"row {i}" for i in range(600)], "id": [f"r{i}" for i in range(600)], "more": [1] * 600}
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": whole, "test": whole.select(range(5))}).save_to_disk(
        str(tmp_path / "splits")
    )
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {i}", "id": f"r{i}"} for i in range(600)])
    common = ("--tokenizer", tokenizer_folder, "--workers", 1)
    for source, output in ((f"hf:{tmp_path}/saved", "hf"), (tmp_path / "a.jsonl", "file")):
        code, _, error = run("shard", "text", "--input", source, *common, "--output", tmp_path / output)
        assert code == 0, error
    for split in ("train", "val"):
        name = f"{split}/rxt-{split}-000000.tar"
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    assert manifest["source"][0]["records"] == 600
    assert len(contents(f"hf:{tmp_path}/splits:test")) == 5
    assert len(contents(f"hf:{tmp_path}/splits")) == 600
    with pytest.raises(DataError, match="has no split nothing; it has train test"):
        contents(f"hf:{tmp_path}/splits:nothing")


@pytest.mark.parametrize(
    ("text", "module", "message"),
    [
        ("hf:name", "datasets", r"reading hf:name needs datasets: pip install rxt-dist\[huggingface\]"),
        ("s3://b/a.txt", "fsspec", r"reading s3://b/a\.txt needs fsspec: pip install rxt-dist\[prep\]"),
        ("wds:{folder}/a.tar.zst", "zstandard", r"needs zstandard: pip install rxt-dist\[prep\]"),
    ],
)
def test_a_missing_package_of_an_input_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, module: str, message: str
) -> None:
    import sys

    (tmp_path / "a.tar.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=message):
        resolve_inputs([text.format(folder=tmp_path)])


def test_names_do_not_depend_on_places() -> None:
    assert Source("/some/where/a.txt", "txt").name == Source("s3://bucket/deep/a.txt", "txt").name == "a.txt"
