"""Encoded parts: what worker processes leave on the disk, and a killed build finds again."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.encode import EncodedChunk, EncodeOptions, Encoder
from data_prep.inputs import Position, RawPart
from rxt_dist.data.blocks import Block, decode_block, document_lengths, encode_block, join_blocks
from rxt_dist.data.manifest import Kind
from rxt_dist.files import fsync_folder

_COLUMNS = tuple(field.name for field in fields(EncodedChunk) if field.name != "block")


@dataclass(frozen=True)
class PartCounts:
    """What a part holds."""

    documents: int
    tokens: int


class StoredPart:
    """A part on the disk; each array is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)

    def __enter__(self) -> StoredPart:
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.close()

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of :class:`data_prep.encode.EncodedChunk`."""
        return np.asarray(self._arrays[name])

    @cached_property
    def end(self) -> Position:
        """Where in the input the part ends."""
        source, record = self._arrays["end"].tolist()
        return Position(source, record)

    @property
    def sources(self) -> npt.NDArray[np.uint32]:
        """[R] the source of every record."""
        return np.asarray(self._arrays["sources"])

    @property
    def document_tokens(self) -> npt.NDArray[np.int64]:
        """[D] tokens of every document."""
        return np.asarray(self._arrays["document_tokens"])

    def block(self, kind: Kind, dtype: np.dtype[Any]) -> Block | None:
        """All documents; None when every record was dropped."""
        if not len(self.document_tokens):
            return None
        members = {name: self._arrays[name].data for name in self._arrays.files if name.endswith(".bin")}
        return decode_block(members, kind, dtype)


def write_part(encoder: Encoder, raw: RawPart, path: Path) -> PartCounts:
    """Encode a part and write it to ``path``: complete or not at all."""
    chunks = [encoder.encode(chunk) for chunk in raw.chunks]
    block = join_blocks([chunk.block for chunk in chunks])
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in _COLUMNS
    }
    arrays["sources"] = np.repeat(
        np.array([chunk.source for chunk in raw.chunks], np.uint32), [len(c.records) for c in raw.chunks]
    )
    arrays["document_tokens"] = document_lengths(block)
    arrays["end"] = np.array([raw.end.source, raw.end.record], np.int64)
    for name, content in encode_block(block).items():
        arrays[name] = np.frombuffer(content, np.uint8)
    # Two processes can have the same work for a moment: the one that was killed and the one after it.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stubs take any name for an option
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)
    return PartCounts(block.num_documents, len(block.tokens))


_worker_encoder: Encoder | None = None


def start_worker(options: EncodeOptions) -> None:
    """Initialise a worker process; the processes are the parallelism, so each uses one thread."""
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(options)


def _end_with_parent() -> None:
    """A worker of a parent that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def write_part_in_worker(raw: RawPart, path: Path) -> PartCounts:
    """:func:`write_part` with the encoder of this worker process."""
    assert _worker_encoder is not None
    return write_part(_worker_encoder, raw, path)
