"""Speed and size of data preparation.

    python -m benchmarks.data_prep [--stories 40000] [--workers 1 2] [--folder /fast/disk]

Text and conversations are those of `rxt-data synth --profile rich`; "distinct turns" are conversations made
of the sentences of the stories, in which no text occurs twice. CPU seconds are those of one process on one
thread. Sizes are of shards with uniformly random tokens, so that only the layout matters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from data_prep.encode import EncodeOptions, Encoder
from data_prep.inputs import InputReader
from data_prep.parts import StoredPart, write_part
from data_prep.plan import make_plan
from data_prep.shard import ShardOptions, build_dataset
from data_prep.sources import resolve_inputs
from data_prep.split_writer import SplitWriter
from data_prep.synth import SynthOptions, write_corpus
from data_prep.train_tokenizer import train_tokenizer
from data_prep.work import WorkFolder
from rxt_dist.data.format import ConversationTokens, Kind, ShardWriter, token_dtype
from rxt_dist.data.index import write_split_indices

VOCAB = 32_000


def row(what: str, value: str) -> None:
    """One line of the table."""
    print(f"{what:58}{value:>20}", flush=True)


def write_distinct_turns(stories: Path, output: Path) -> Path:
    """Conversations of three interactions from the sentences of the stories, each used once."""
    seen: set[str] = set()

    def sentences() -> Iterator[str]:
        for line in stories.open():
            for sentence in json.loads(line)["text"].split("."):
                text = sentence.strip()
                if text and text not in seen:
                    seen.add(text)
                    yield text + "."

    found = list(sentences())
    with output.open("w") as file:
        for start in range(0, len(found) - 5, 6):
            turns = [{"query": found[i], "answer": found[i + 1]} for i in range(start, start + 6, 2)]
            file.write(json.dumps({"interactions": turns}) + "\n")
    return output


def tokens_per_second(kind: Kind, source: Path, tokenizer: Path, repeats: int) -> tuple[float, float]:
    """Million tokens a CPU second of encoding, and megabytes a CPU second of reading alone."""
    encoder = Encoder(EncodeOptions(tokenizer, kind))
    start = time.process_time()
    chunks = [chunk for chunk, _ in InputReader(resolve_inputs([source]), source.parent).chunks()]
    reading = source.stat().st_size / (time.process_time() - start)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        tokens = sum(len(encoder.encode(chunk).block.tokens) for chunk in chunks)
        best = min(best, time.process_time() - start)
    return tokens / best / 1e6, reading / 1e6


def writing_speed(kind: Kind, source: Path, tokenizer: Path, folder: Path) -> float:
    """Million tokens a CPU second of the single process that plans and writes the shards."""
    options = ShardOptions(kind=kind, inputs=[source], tokenizer=tokenizer, output=folder / "written")
    sources = resolve_inputs([source])
    with WorkFolder(options.output, options.identity(), sources) as work:
        encoder = Encoder(options.encode_options())
        paths = []
        for raw in InputReader(sources, work.downloads, work).parts(
            options.part_bytes, 0, work.resume_point()[1]
        ):
            paths.append(work.part_path(raw.number))
            write_part(encoder, raw, paths[-1])
        work.dataset.mkdir()
        dtype = token_dtype(VOCAB)
        start = time.process_time()
        plan = make_plan(paths, 1, 0.0, False)
        with SplitWriter(work.dataset, "train", kind, dtype) as writer:
            for path in paths:
                with StoredPart(path) as part:
                    block = part.block(kind, dtype)
                assert block is not None
                writer.add(block)
        seconds = time.process_time() - start
        return int(plan.sources.tokens[0]) / seconds / 1e6


def build_speed(kind: Kind, source: Path, tokenizer: Path, folder: Path, workers: int) -> float:
    """Million tokens a second of wall time of a whole build."""
    start = time.perf_counter()
    manifest = build_dataset(
        ShardOptions(
            kind=kind,
            inputs=[source],
            tokenizer=tokenizer,
            output=folder / f"{kind}-{workers}",
            workers=workers,
            part_bytes=2 << 20,  # the corpus is small: so every worker has several
        )
    )
    return sum(counts.tokens for counts in manifest.counts.values()) / (time.perf_counter() - start) / 1e6


def overhead(
    folder: Path, name: str, items: Sequence[np.ndarray | ConversationTokens]
) -> tuple[float, float]:
    """Bytes of the tar, and of tar and both indices, for each byte of tokens."""
    target = folder / name / "train"
    target.mkdir(parents=True)
    kind: Kind = "text" if isinstance(items[0], np.ndarray) else "conversations"
    with ShardWriter(target / "rxt-train-000000.tar", kind, token_dtype(VOCAB), 0) as writer:
        for item in items:
            writer.add(item)
        info = writer.close()
    payload = info.tokens * token_dtype(VOCAB).itemsize
    split = write_split_indices(folder / name, [info])["train"]
    indices = info.index_path_in(folder / name).stat().st_size + split.bytes
    return info.bytes / payload, (info.bytes + indices) / payload


def size_rows(folder: Path) -> None:
    """Size of the layout for documents of several lengths."""
    rng = np.random.default_rng(0)
    for length in (1024, 512, 128):
        items = [rng.integers(7, VOCAB, length) for _ in range(2_000_000 // length)]
        tar, both = overhead(folder, f"text-{length}", items)
        row(f"documents of {length} tokens: tar / payload, with indices", f"{tar:.3f}, {both:.3f}")
    for interactions in (1, 2, 3):
        lengths = np.full(2 * interactions, 50 // (2 * interactions))
        talks = [
            ConversationTokens([rng.integers(7, VOCAB, n) for n in lengths], [1, 2] * interactions)
            for _ in range(20_000)
        ]
        tar, both = overhead(folder, f"talks-{interactions}", talks)
        row(f"conversations of 50 tokens, {interactions} interactions", f"{tar:.3f}, {both:.3f}")


def main() -> None:
    """Generate the corpora, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stories", type=int, default=40_000, help="stories; a quarter as many conversations"
    )
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[1, 2], help="processes of the whole builds"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where temporary files are written")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(f"python {platform.python_version()}, tokenizers {tokenizers.__version__}, {os.cpu_count()} CPUs\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        corpus, tokenizer = folder / "corpus", folder / "tokenizer"
        write_corpus(
            corpus,
            SynthOptions(profile="rich", stories=arguments.stories, conversations=arguments.stories // 4),
        )
        stories, talks = corpus / "stories.jsonl", corpus / "conversations.jsonl"
        train_tokenizer([stories, talks], 8000, tokenizer)
        distinct = write_distinct_turns(stories, corpus / "distinct.jsonl")
        corpora: list[tuple[str, Kind, Path]] = [
            ("stories", "text", stories),
            ("conversations", "conversations", talks),
            ("conversations, distinct turns", "conversations", distinct),
        ]
        for name, kind, source in corpora:
            rate, reading = tokens_per_second(kind, source, tokenizer, arguments.repeats)
            row(f"{name}: parsing and tokenising", f"{rate:.2f} M tokens/CPU s")
            row(f"{name}: reading", f"{reading:.0f} MB/CPU s")
        for name, kind, source in corpora[:2]:
            row(f"{name}: writing", f"{writing_speed(kind, source, tokenizer, folder):.1f} M tokens/CPU s")
        for workers in arguments.workers:
            rate = build_speed("text", stories, tokenizer, folder, workers)
            row(f"stories: whole build, {workers} workers", f"{rate:.2f} M tokens/s")
        size_rows(folder)


if __name__ == "__main__":
    main()
