"""The shards of one split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rxt_dist.data.blocks import Block
from rxt_dist.data.cutter import BLOCK_DOCUMENTS, BlockCutter
from rxt_dist.data.format import Kind, ShardWriter
from rxt_dist.data.manifest import ShardInfo, Split

DEFAULT_SHARD_BYTES = 256 << 20
MIN_SHARD_BYTES = 10240  # the smallest tar


class SplitWriter:
    """Cuts documents into blocks and gathers these in shards; the block that reaches its size ends a shard.

    Use as a context manager; an exception removes the shard being written.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        kind: Kind,
        dtype: np.dtype[Any],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        block_documents: int = BLOCK_DOCUMENTS,
        finished: Sequence[ShardInfo] = (),
        on_shard: Callable[[ShardInfo], None] | None = None,
    ) -> None:
        """``folder`` is that of the dataset. ``finished``: shards there already; ``on_shard`` is told of
        every further one."""
        self._folder, self._split, self._kind, self._dtype = folder / split, split, kind, dtype
        self._shard_bytes = shard_bytes
        self._cutter = BlockCutter(block_documents)
        self._writer: ShardWriter | None = None
        self._on_shard = on_shard
        self.shards = list(finished)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write(self._cutter.finish())
                self._finish_shard()
        finally:
            if self._writer is not None:
                self._writer.abort()

    def add(self, block: Block) -> None:
        """Append all documents of ``block``."""
        self._write(self._cutter.add(block))

    def _write(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if self._writer is None:
                self._folder.mkdir(exist_ok=True)
                number = len(self.shards)
                path = self._folder / f"rxt-{self._split}-{number:06d}.tar"
                self._writer = ShardWriter(path, self._kind, self._dtype, number)
            self._writer.write_block(block)
            if self._writer.bytes_written >= self._shard_bytes:
                self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is not None:
            self.shards.append(self._writer.close())
            self._writer = None
            if self._on_shard is not None:
                self._on_shard(self.shards[-1])
