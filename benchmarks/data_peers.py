"""One pass over the same documents through this reader and through other data libraries, in one process.

    python -m benchmarks.data_peers [--tokens 5000000] [--folder /fast/disk]

Every library gets the documents in the layout that its own writer makes (one document a sample) and delivers
each of them as an int64 array in the most thorough shuffle that it has. webdataset comes with the package;
mosaicml-streaming and litdata are measured where they are installed. Best of --repeats passes, warm cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import SEQ_LEN, documents, seconds, write_dataset
from rxt_dist.data.order import PackCursor, PackStream
from rxt_dist.data.pieces import TextPieces
from rxt_dist.data.reader import Dataset

Pass = Callable[[], Iterator[np.ndarray]]
PACK_TOKENS = 16_384
SHUFFLE_BUFFER = 1000


def ours(folder: Path, items: Sequence[np.ndarray]) -> Pass:
    """Packs of the global shuffle, read and crc-checked; a pack's tokens come as one array."""
    write_dataset(folder, "text", items)

    def run() -> Iterator[np.ndarray]:
        source = TextPieces(Dataset(folder, "train"), SEQ_LEN)
        stream, cursor = PackStream(source.lengths, key=1, pack_tokens=PACK_TOKENS), PackCursor()
        while True:
            pack, cursor = stream.next_pack(cursor)
            pieces = pack.pieces[pack.epochs == 0]
            if len(pieces):
                yield source.read_tokens(pieces)
            if cursor.epoch:
                return

    return run


def with_webdataset(folder: Path, items: Sequence[np.ndarray]) -> Pass:
    """Shards in random order and a buffer of 1,000 samples."""
    import webdataset as wds

    folder.mkdir()
    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=2000, verbose=0, encoder=False) as writer:
        for number, item in enumerate(items):
            writer.write({"__key__": f"{number:09d}", "bin": item.astype(np.uint16).tobytes()})
    urls = sorted(map(str, folder.glob("*.tar")))

    def run() -> Iterator[np.ndarray]:
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(SHUFFLE_BUFFER)
        return (np.frombuffer(sample["bin"], np.uint16).astype(np.int64) for sample in dataset)

    return run


def with_streaming(folder: Path, items: Sequence[np.ndarray]) -> Pass:
    """MDS shards, algorithm py1e."""
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}) as writer:
        for item in items:
            writer.write({"tokens": item.astype(np.uint16)})

    def run() -> Iterator[np.ndarray]:
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=1)
        return (sample["tokens"].astype(np.int64) for sample in dataset)

    return run


def with_litdata(folder: Path, items: Sequence[np.ndarray]) -> Pass:
    """Binary chunks of 64 MB."""
    import litdata
    import torch
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, item in enumerate(items):
        writer[number] = torch.from_numpy(item.astype(np.int32))
    writer.done()
    writer.merge()

    def run() -> Iterator[np.ndarray]:
        dataset = litdata.StreamingDataset(str(folder), shuffle=True)
        return (sample.numpy().astype(np.int64) for sample in dataset)

    return run


LIBRARIES: dict[str, tuple[str, Callable[[Path, Sequence[np.ndarray]], Pass]]] = {
    "rxt_dist": ("rxt_dist", ours),
    "webdataset": ("webdataset", with_webdataset),
    "mosaicml-streaming": ("streaming", with_streaming),
    "litdata": ("litdata", with_litdata),
}


def measure(run: Pass, tokens: int, repeats: int) -> float:
    """Tokens a second of the best pass. Raises ValueError if a pass does not deliver all of them."""

    def whole() -> None:
        found = sum(len(array) for array in run())
        if found != tokens:
            raise ValueError(f"the pass delivered {found} of {tokens} tokens")

    return tokens / min(seconds(whole) for _ in range(repeats))


def main() -> None:
    """Build the datasets, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary datasets are written")
    arguments = parser.parse_args()
    items: list[Any] = documents(arguments.tokens, np.random.default_rng(0))
    tokens = sum(map(len, items))
    print(f"{len(items):,} documents of 512 to 1,536 tokens, {tokens:,} tokens\n")
    print(f"{'library':24}{'rate':>10}{'size on disk':>30}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for name, (module, build) in LIBRARIES.items():
            if importlib.util.find_spec(module) is None:
                print(f"{name:24}skipped: not installed")
                continue
            folder = Path(temporary) / name
            rate = measure(build(folder, items), tokens, arguments.repeats)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{name:24}{rate / 1e6:>8.1f} M tokens/s{size / (2 * tokens):>14.2f} x 2 bytes a token")


if __name__ == "__main__":
    main()
