"""Small datasets and in-memory piece sources for the tests of the reading side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rxt_dist.data.format import ConversationTokens, Kind, ShardWriter, token_dtype
from rxt_dist.data.index import write_split_indices
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    ShardInfo,
    SplitCounts,
    fingerprint_of,
    write_manifest,
)
from rxt_dist.data.pieces import Piece

VOCAB = 1000
PAD, UNK, BOS, EOS, MASK, QUERY, ANSWER = range(7)
FIRST_ORDINARY = 7

# One query: ordinary ids; one answer: ordinary ids; their marks for the answer.
Turn = tuple[Sequence[int], Sequence[int]]


def document(length: int, seed: int, vocab: int = VOCAB) -> np.ndarray:
    """[BOS] random ordinary tokens [EOS]; ``length`` counts all of them."""
    tokens = np.random.default_rng(seed).integers(FIRST_ORDINARY, vocab, length)
    tokens[0], tokens[-1] = BOS, EOS
    return tokens


def conversation(
    turns: Sequence[Turn], system: Sequence[int] = (), marked: bool = False
) -> ConversationTokens:
    """A conversation from ordinary ids. ``marked``: answer token k of interaction j gets mark (j + k) % 3."""
    segments = [np.array([BOS, *system])] if system else []
    roles = [0] if system else []
    marks = [np.zeros(1 + len(system), np.uint8)] if system else []
    for j, (query, answer) in enumerate(turns):
        segments += [np.array([BOS, QUERY, *query]), np.array([ANSWER, *answer, EOS])]
        roles += [1, 2]
        answer_marks = [0, *((j + k) % 3 for k in range(len(answer))), 0]
        marks += [np.zeros(2 + len(query), np.uint8), np.array(answer_marks, np.uint8)]
    return ConversationTokens(segments, roles, marks if marked else None)


def random_conversations(
    count: int, seed: int, max_turns: int = 5, max_part: int = 9
) -> list[ConversationTokens]:
    """Conversations of 1..max_turns interactions; every third has a system text, every second is marked."""
    rng = np.random.default_rng(seed)

    def part() -> list[int]:
        return rng.integers(FIRST_ORDINARY, VOCAB, int(rng.integers(0, max_part + 1))).tolist()

    return [
        conversation(
            [(part(), part()) for _ in range(int(rng.integers(1, max_turns + 1)))],
            system=[*part(), 9] if i % 3 == 0 else (),
            marked=i % 2 == 0,
        )
        for i in range(count)
    ]


def write_dataset(
    folder: Path,
    kind: Kind,
    train: Sequence[object],
    val: Sequence[object] = (),
    *,
    documents_per_shard: int = 7,
    block_documents: int = 3,
    vocab: int = VOCAB,
    format_version: int = FORMAT_VERSION,
) -> Path:
    """Write a dataset folder (no tokenizer) and return it. Version 1 has no split indices."""
    dtype = token_dtype(vocab)
    shards: list[ShardInfo] = []
    for split, documents in (("train", train), ("val", val)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(documents), documents_per_shard)):
            path = folder / split / f"rxt-{split}-{number:06d}.tar"
            with ShardWriter(path, kind, dtype, number, block_documents) as writer:
                for item in documents[start : start + documents_per_shard]:
                    writer.add(item)  # type: ignore[arg-type]
                shards.append(writer.close())
    counts = {
        split: SplitCounts(
            documents=sum(s.documents for s in shards if s.split == split),
            conversations=sum(s.conversations for s in shards if s.split == split),
            interactions=sum(s.interactions for s in shards if s.split == split),
            tokens=sum(s.tokens for s in shards if s.split == split),
            truncated=0,
        )
        for split in ("train", "val")
    }
    manifest = Manifest(
        format_version=format_version,
        dataset_id="test",
        kind=kind,
        created_by="tests",
        dtype=dtype.name,
        byte_order="little",
        vocab_size=vocab,
        special_tokens={"[PAD]": PAD, "[BOS]": BOS, "[EOS]": EOS, "[MASK]": MASK},
        tokenizer_sha256="0" * 64,
        val_fraction=0.1,
        source=[],
        counts=counts,
        shards=shards,
        split_indices=write_split_indices(folder, shards) if format_version > 1 else {},
        fingerprint="0" * 64,
    )
    write_manifest(folder, manifest.model_copy(update={"fingerprint": fingerprint_of(manifest)}))
    return folder


class ArrayPieces:
    """Pieces in memory: token t of piece p is ``1000 p + t``, the last ``supervised[p]`` are targets."""

    def __init__(self, lengths: Sequence[int], supervised: Sequence[int] | None = None) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.supervised = np.array(supervised, dtype=np.int32) if supervised is not None else self.lengths - 1
        self.fingerprint = "memory"

    def read_tokens(self, pieces: np.ndarray) -> np.ndarray:
        parts = [1000 * p + np.arange(self.lengths[p]) for p in pieces.tolist()]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def lost(self, pieces: np.ndarray) -> np.ndarray:
        return np.zeros(len(pieces), dtype=np.bool_)

    def damage(self) -> dict:
        return {}

    def read(self, piece: int) -> Piece:
        return Piece(self.read_tokens(np.array([piece])), int(self.lengths[piece] - self.supervised[piece]))
