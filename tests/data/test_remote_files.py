"""Datasets at URLs: the same tokens, each shard fetched once, whatever the server and the cache do."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from dataset_builder import document, random_conversations, write_dataset
from helpers.file_server import FileServer, serve

from rxt_dist.data import remote
from rxt_dist.data.cache import ShardCache, locked
from rxt_dist.data.files import open_files
from rxt_dist.data.manifest import fingerprint_of, load_manifest, write_manifest
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.data.remote import UnreachableError
from rxt_dist.errors import DataError

SHARDS = 12
TOKENIZER = b'{"version": "1.0"}'
_context = multiprocessing.get_context("spawn")  # the server has threads, which a fork would not survive


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text`` and ``talk``, each with a tokenizer."""
    root = tmp_path_factory.mktemp("served")
    texts = [document(20 + i % 9, seed=i) for i in range(5 * SHARDS)]
    write_dataset(root / "text", "text", texts, texts[:7], documents_per_shard=5)
    talks = random_conversations(60, seed=3)
    write_dataset(root / "talk", "conversations", talks, talks[:9])
    for name in ("text", "talk"):
        (root / name / "tokenizer").mkdir()
        (root / name / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER)
        changed = {"tokenizer_sha256": hashlib.sha256(TOKENIZER).hexdigest()}
        manifest = load_manifest(root / name).model_copy(update=changed)
        fingerprint = {"fingerprint": fingerprint_of(manifest)}
        write_manifest(root / name, manifest.model_copy(update=fingerprint))
    return root


@pytest.fixture
def server(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.01)
    with serve(folders) as found:
        yield found


def remote_dataset(url: str, cache: Path, limit: int | None = None, skip: bool = False) -> Dataset:
    return Dataset(open_files(url, ShardCache(cache, limit)), "train", skip_corrupt=skip)


def cached(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/*/*"))


def shards_in(cache: Path) -> list[str]:
    return [name for name in cached(cache) if ".tar" in name]


def all_tokens(dataset: Dataset) -> list[int]:
    source = TextPieces(dataset, 64)
    return source.read_tokens(np.random.default_rng(1).permutation(len(source.lengths))).tolist()


@pytest.fixture(scope="module")
def expected(folders: Path) -> list[int]:
    return all_tokens(Dataset(folders / "text", "train"))


@pytest.fixture(scope="module")
def shard_bytes(folders: Path) -> int:
    return max(shard.bytes for shard in load_manifest(folders / "text").shards)


def test_a_url_delivers_what_the_folder_does(server: FileServer, folders: Path, tmp_path: Path) -> None:
    key = "?key=secret"
    for split in ("train", "val"):
        here = InteractionPieces(Dataset(folders / "talk", split), 16)
        files = open_files(f"{server.url}/talk/{key}", ShardCache(tmp_path, None))
        there = InteractionPieces(Dataset(files, split), 16)
        assert there.fingerprint == here.fingerprint
        order = np.random.default_rng(0).permutation(len(here.lengths))
        assert there.read_tokens(order).tolist() == here.read_tokens(order).tolist()
        assert there.read_marks(order).tolist() == here.read_marks(order).tolist()
        prompts = np.arange(here.dataset.num_documents)
        assert there.read_prompts(prompts).tolist() == here.read_prompts(prompts).tolist()
        assert (files.tokenizer_folder() / "tokenizer.json").read_bytes() == TOKENIZER
        assert files.name == f"{server.url}/talk/"
    assert server.queries == {key[1:]}
    counts = dict(server.requests)
    assert counts.pop("talk/manifest.json") == 2  # it may have changed
    assert set(counts.values()) == {1}


def test_shards_are_fetched_when_they_are_needed(
    server: FileServer, tmp_path: Path, expected: list[int]
) -> None:
    dataset = remote_dataset(f"{server.url}/text", tmp_path)
    assert shards_in(tmp_path) == []
    dataset.text_document(17)
    dataset.text_document(18)
    assert shards_in(tmp_path) == ["rxt-train-000003.tar"]
    assert all_tokens(dataset) == expected
    assert len(shards_in(tmp_path)) == SHARDS
    before = server.requests.copy()
    assert all_tokens(remote_dataset(f"{server.url}/text", tmp_path)) == expected
    assert server.requests - before == {"text/manifest.json": 1}


def test_what_a_read_needs_is_fetched_at_once(
    server: FileServer, tmp_path: Path, expected: list[int]
) -> None:
    dataset = remote_dataset(f"{server.url}/text", tmp_path)
    server.seconds, server.most_at_once = 0.2, 0
    assert all_tokens(dataset) == expected
    assert server.most_at_once > SHARDS // 2


def read_in_process(url: str, cache: Path, limit: int | None, output: Path) -> None:
    output.write_text(json.dumps(all_tokens(remote_dataset(url, cache, limit))))


def read_in_processes(count: int, url: str, cache: Path, limit: int | None) -> list[list[int]]:
    outputs = [cache.with_name(f"{cache.name}-{number}.json") for number in range(count)]
    processes = [
        _context.Process(target=read_in_process, args=(url, cache, limit, output)) for output in outputs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [json.loads(output.read_text()) for output in outputs]


def test_processes_of_a_host_fetch_a_shard_once(
    server: FileServer, tmp_path: Path, expected: list[int]
) -> None:
    server.seconds = 0.02
    found = read_in_processes(3, f"{server.url}/text", tmp_path / "cache", None)
    assert found == [expected] * 3
    assert server.requests.pop("text/manifest.json") == 3
    assert set(server.requests.values()) == {1}
    assert not [name for name in cached(tmp_path / "cache") if name.endswith((".part", ".tmp"))]


def test_processes_share_a_cache_that_is_too_small(
    server: FileServer, tmp_path: Path, expected: list[int], shard_bytes: int
) -> None:
    found = read_in_processes(3, f"{server.url}/text", tmp_path / "cache", 2 * shard_bytes)
    assert found == [expected] * 3
    assert 1 <= len(shards_in(tmp_path / "cache")) <= 2


@pytest.mark.parametrize("shards", [1, 3])
def test_the_cache_never_exceeds_its_limit(
    server: FileServer, tmp_path: Path, expected: list[int], shard_bytes: int, shards: int
) -> None:
    sizes: list[int] = []

    def measure(path: str, number: int, content: bytes) -> bytes:
        found = {}  # by inode: a shard may get its name between two looks
        with locked(tmp_path / ".lock"):  # so that nothing is removed or reserved meanwhile
            for file in tmp_path.glob("*/*/*.tar*"):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    found[status.st_ino] = status.st_size
        sizes.append(sum(found.values()))
        return content

    server.change = measure
    dataset = remote_dataset(f"{server.url}/text", tmp_path, shards * shard_bytes)
    for _ in range(2):
        assert all_tokens(dataset) == expected
    assert max(sizes) <= shards * shard_bytes
    assert max(sizes) > (shards - 1) * shard_bytes
    fetched = sum(count for path, count in server.requests.items() if path.endswith(".tar"))
    assert fetched > SHARDS


def test_a_shard_that_is_read_survives_its_removal(
    server: FileServer, tmp_path: Path, shard_bytes: int
) -> None:
    limit = 2 * shard_bytes
    first, second = (remote_dataset(f"{server.url}/text", tmp_path, limit) for _ in range(2))
    kept = first.text_document(0).tolist()
    for number in (5, 10, 15):
        second.text_document(number)
    assert shards_in(tmp_path) == ["rxt-train-000002.tar", "rxt-train-000003.tar"]
    before = server.requests.copy()
    assert first.text_document(0).tolist() == kept
    assert server.requests == before


def test_the_least_recently_used_shard_is_removed(
    server: FileServer, tmp_path: Path, shard_bytes: int
) -> None:
    dataset = remote_dataset(f"{server.url}/text", tmp_path, 3 * shard_bytes)
    for number in (0, 5, 10, 0, 15):  # 0 is used again, though it is open all the time
        dataset.text_document(number)
    assert shards_in(tmp_path) == [f"rxt-train-00000{n}.tar" for n in (0, 2, 3)]


def test_a_killed_download_leaves_nothing_behind(
    server: FileServer, tmp_path: Path, expected: list[int]
) -> None:
    server.stall_after = lambda path: 700 if path.endswith("rxt-train-000003.tar") else None
    cache = tmp_path / "cache"
    process = _context.Process(
        target=read_in_process, args=(f"{server.url}/text", cache, 1 << 30, tmp_path / "none.json")
    )
    process.start()
    assert server.stalled.wait(20)
    process.kill()
    process.join()
    assert "rxt-train-000003.tar.part" in cached(cache)
    server.stall_after = lambda path: None
    dataset = remote_dataset(f"{server.url}/text", cache)
    assert "rxt-train-000003.tar.part" not in cached(cache)
    assert all_tokens(dataset) == expected
    assert not [name for name in cached(cache) if name.endswith(".part")]


def test_a_process_waits_for_the_download_of_another_and_takes_over(
    server: FileServer, tmp_path: Path
) -> None:
    server.stall_after = lambda path: 700 if server.requests[path] == 1 and path.endswith(".tar") else None
    cache = tmp_path / "cache"
    process = _context.Process(
        target=read_in_process, args=(f"{server.url}/text", cache, None, tmp_path / "none.json")
    )
    process.start()
    assert server.stalled.wait(20)
    (part, *_) = [name for name in cached(cache) if name.endswith(".part")]
    shard = int(part[10:16])
    dataset = remote_dataset(f"{server.url}/text", cache)
    assert part in cached(cache)  # it is in use, and not what a killed process left
    found: list[list[int]] = []
    waiting = threading.Thread(target=lambda: found.append(dataset.text_document(5 * shard).tolist()))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    process.kill()
    process.join()
    waiting.join(20)
    assert found == [document(20 + 5 * shard % 9, seed=5 * shard).tolist()]
    assert part not in cached(cache)


def test_who_waits_for_a_shard_gets_it_while_the_other_reads_it(server: FileServer, tmp_path: Path) -> None:
    server.stall_after = lambda path: 700 if path.endswith(".tar") else None
    readers = [remote_dataset(f"{server.url}/text", tmp_path) for _ in range(3)]
    found: list[list[int]] = []

    def read(dataset: Dataset) -> None:
        found.append(dataset.text_document(0).tolist())

    threads = [threading.Thread(target=read, args=(dataset,), daemon=True) for dataset in readers]
    for thread in threads:
        thread.start()
    assert server.stalled.wait(20)
    threads[0].join(0.2)
    server.go_on()
    for thread in threads:
        thread.join(10)
    assert found == [document(20, seed=0).tolist()] * 3  # each of which still has it open
    assert server.requests["text/train/rxt-train-000000.tar"] == 1


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


SHARD = "text/train/rxt-train-000001.tar"


@pytest.mark.parametrize("bad", [flip, lambda content: content[:-512], lambda content: content + b"\0"])
def test_a_damaged_shard_is_asked_for_again_and_then_refused(
    server: FileServer, tmp_path: Path, bad: object
) -> None:
    server.change = lambda path, number, content: bad(content) if path == SHARD else content  # type: ignore[operator]
    dataset = remote_dataset(f"{server.url}/text", tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{SHARD} is damaged: it.* \(fetched 4 times\)"):
            dataset.text_document(5)
    assert server.requests[SHARD] == 4
    assert shards_in(tmp_path) == []
    dataset.text_document(0)
    server.change = lambda path, number, content: bad(content) if path == SHARD and number < 7 else content  # type: ignore[operator]
    fresh = remote_dataset(f"{server.url}/text", tmp_path / "other")
    server.requests[SHARD] = 4
    assert fresh.text_document(5).tolist() == document(25, seed=5).tolist()
    assert server.requests[SHARD] == 7


def test_a_broken_connection_is_tried_again(server: FileServer, tmp_path: Path) -> None:
    server.sent = lambda path, number: 900 if path == SHARD and number < 4 else None
    dataset = remote_dataset(f"{server.url}/text", tmp_path)
    assert dataset.text_document(5).tolist() == document(25, seed=5).tolist()
    assert server.requests[SHARD] == 4


@pytest.mark.parametrize(
    ("status", "requests", "message"),
    [(503, 4, "cannot fetch: .*503"), (429, 4, "cannot fetch: .*429"), (403, 1, "cannot fetch: 403")],
)
def test_a_server_that_refuses(
    server: FileServer, tmp_path: Path, status: int, requests: int, message: str
) -> None:
    """That is no damage: nothing of it is left out of the training."""
    server.status = lambda path, number: status if path == SHARD else 200
    dataset = remote_dataset(f"{server.url}/text", tmp_path, skip=True)
    for number, documents in enumerate((np.arange(60), np.arange(5, 7)), start=1):
        with pytest.raises(UnreachableError, match=message):
            dataset.lost(documents)
        assert server.requests[SHARD] == number * requests
    assert dataset.damage() == {}
    server.status = lambda path, number: 200
    assert not dataset.lost(np.arange(60)).any()


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_damage_on_the_server_can_be_left_out(server: FileServer, tmp_path: Path, how: str) -> None:
    if how == "flipped":
        server.change = lambda path, number, content: flip(content) if path == SHARD else content
    else:
        server.status = lambda path, number: 404 if path == SHARD else 200
    dataset = remote_dataset(f"{server.url}/text", tmp_path, skip=True)
    lost = dataset.lost(np.arange(60))
    assert np.flatnonzero(lost).tolist() == [5, 6, 7, 8, 9]
    assert len(dataset.damage()) == 2  # its blocks
    assert server.requests[SHARD] == (4 if how == "flipped" else 1)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("manifest.json", flip, r"text/manifest\.json"),
        ("manifest.json", lambda content: b"{", r"text/manifest\.json is damaged: not JSON"),
        ("train/rxt-train.idx", flip, r"rxt-train\.idx is damaged: its sha256"),
        (
            "train/rxt-train.idx",
            lambda content: content + b"0",
            r"rxt-train\.idx is damaged: it has more than",
        ),
        ("tokenizer/tokenizer.json", flip, r"tokenizer\.json is damaged: its sha256"),
    ],
)
def test_damaged_files_of_the_start(
    server: FileServer, tmp_path: Path, file: str, change: object, message: str
) -> None:
    server.change = lambda path, number, content: change(content) if path == f"text/{file}" else content  # type: ignore[operator]

    def start() -> None:
        files = open_files(f"{server.url}/text", ShardCache(tmp_path, None))
        Dataset(files, "train")
        files.tokenizer_folder()

    with pytest.raises(DataError, match=message):
        start()
    assert Path(file).name not in cached(tmp_path)


def test_mistakes_are_named(server: FileServer, tmp_path: Path, shard_bytes: int) -> None:
    cache = ShardCache(tmp_path, None)
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: cannot fetch: 404"):
        open_files(f"{server.url}/nowhere", cache)
    with pytest.raises(DataError, match=r"nostore://bucket/data/manifest\.json: .*Protocol not known"):
        open_files("nostore://bucket/data", cache)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9/text/manifest\.json: cannot fetch"):
        open_files("http://user:word@127.0.0.1:9/text", cache)
    with pytest.raises(DataError, match=r"text is a URL; set data\.cache_dir"):
        open_files(f"{server.url}/text", None)
    small = ShardCache(tmp_path, shard_bytes - 1)
    with pytest.raises(
        DataError, match=rf"data\.cache_bytes: found {shard_bytes - 1}, .* valid: {shard_bytes} or more"
    ):
        open_files(f"{server.url}/text", small)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir: .*file.* cannot be used"):
        ShardCache(tmp_path / "file" / "cache", None)


def test_stores_of_fsspec(folders: Path, tmp_path: Path, expected: list[int]) -> None:
    """The memory and the file store stand for the remote ones."""
    import fsspec

    assert all_tokens(remote_dataset(f"file://{folders}/text", tmp_path / "a")) == expected
    memory = fsspec.filesystem("memory")
    memory.put(str(folders / "text"), "/", recursive=True)
    try:
        assert all_tokens(remote_dataset("memory://text", tmp_path / "b")) == expected
        with pytest.raises(DataError, match=r"memory://none/manifest\.json: cannot fetch"):
            remote_dataset("memory://none", tmp_path / "b")
    finally:
        memory.rm("/text", recursive=True)


def test_a_changed_dataset_has_its_own_shards(folders: Path, tmp_path: Path) -> None:
    """Its shards have the same names and, as it happens, sizes."""
    shutil.copytree(folders / "text", tmp_path / "site" / "text")
    with serve(tmp_path / "site") as server:
        dataset = remote_dataset(f"{server.url}/text", tmp_path / "cache")
        assert dataset.text_document(0).tolist() == document(20, seed=0).tolist()
        shutil.rmtree(tmp_path / "site" / "text")
        others = [document(20 + i % 9, seed=100 + i) for i in range(60)]
        write_dataset(tmp_path / "site" / "text", "text", others, documents_per_shard=5)
        changed = remote_dataset(f"{server.url}/text", tmp_path / "cache")
        assert changed.text_document(0).tolist() == others[0].tolist()
        assert changed.fingerprint != dataset.fingerprint


def test_damage_in_the_cache(server: FileServer, tmp_path: Path) -> None:
    remote_dataset(f"{server.url}/text", tmp_path).text_document(0)
    (path,) = tmp_path.glob("*/train/*.tar")
    sound = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(sound[:-512])  # noticed by its size: fetched again
    dataset = remote_dataset(f"{server.url}/text", tmp_path)
    assert dataset.text_document(0).tolist() == document(20, seed=0).tolist()
    assert path.read_bytes() == sound
    path.write_bytes(flip(sound[:1536]) + sound[1536:])
    with pytest.raises(DataError, match=rf"\(in {path.parent.parent}\) is damaged: block 0: crc32"):
        remote_dataset(f"{server.url}/text", tmp_path).text_document(0)


def test_joined_indices_are_kept(server: FileServer, folders: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders / "talk", copy)
    cache = ShardCache(tmp_path / "cache", None)
    whole = Dataset(copy, "train").index
    assert vars(Dataset(open_files(copy, cache), "train").index).keys() == vars(whole).keys()
    for shard in copy.glob("train/*"):  # nothing of a shard is looked at before it is needed
        shard.unlink()
    again = Dataset(open_files(copy, cache), "train").index
    for name, values in vars(whole).items():
        assert np.array_equal(getattr(again, name), values)
    with pytest.raises(DataError, match="cannot read the index"):
        Dataset(copy, "train")
    (joined,) = (tmp_path / "cache").glob("*/train.idx")
    joined.write_bytes(flip(joined.read_bytes()))
    with pytest.raises(DataError, match=r"copy/train/rxt-train\.idx: cannot read the index"):
        Dataset(open_files(copy, cache), "train")  # a damaged one is made again
    url = f"{server.url}/talk"
    Dataset(open_files(url, cache), "train")
    (joined,) = set((tmp_path / "cache").glob("*/train.idx")) - {joined}
    joined.write_bytes(joined.read_bytes()[:-1])
    before = server.requests.copy()
    assert np.array_equal(Dataset(open_files(url, cache), "train").index.blocks, whole.blocks)
    assert server.requests - before == {"talk/manifest.json": 1, "talk/train/rxt-train.idx": 1}


def test_a_remote_dataset_without_split_indices_is_read(tmp_path: Path) -> None:
    texts = [document(20, seed=i) for i in range(20)]
    write_dataset(tmp_path / "site" / "old", "text", texts, documents_per_shard=4, format_version=1)
    with serve(tmp_path / "site") as server:
        dataset = remote_dataset(f"{server.url}/old", tmp_path / "cache")
        assert dataset.text_document(17).tolist() == texts[17].tolist()
        indices = {path: count for path, count in server.requests.items() if path.endswith(".idx")}
    assert indices == {f"old/train/rxt-train-{number:06d}.idx": 1 for number in range(5)}


def test_a_folder_that_cannot_be_written(server: FileServer, tmp_path: Path) -> None:
    dataset = remote_dataset(f"{server.url}/text", tmp_path)
    (
        tmp_path / next(tmp_path.glob("*/train.idx")).parent.name / "train"
    ).touch()  # a file in place of a folder
    with pytest.raises(DataError, match=r"rxt-train-000000\.tar: cannot be cached: "):
        dataset.text_document(0)
