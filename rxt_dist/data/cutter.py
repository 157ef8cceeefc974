"""Cutting a stream of documents into blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rxt_dist.data.blocks import Block, document_lengths, join_blocks, slice_documents, starts_of

BLOCK_DOCUMENTS = 256
BLOCK_BYTES = 262144


class BlockCutter:
    """Forms blocks of ``documents`` documents, fewer where their tokens would exceed ``size`` bytes.

    A longer document has a block of its own. The result depends on the order of the documents only, not on
    how they are grouped when they are added.
    """

    def __init__(self, documents: int = BLOCK_DOCUMENTS, size: int = BLOCK_BYTES) -> None:
        self._documents, self._size = documents, size
        self._pending: list[Block] = []
        self._pending_documents = 0
        self._pending_bytes = 0

    def add(self, block: Block) -> Iterator[Block]:
        """Append the documents of ``block`` (any number); yields the blocks that are complete."""
        if block.num_documents == 0:
            return
        self._pending.append(block)
        self._pending_documents += block.num_documents
        self._pending_bytes += block.tokens.nbytes
        if self._pending_documents >= self._documents or self._pending_bytes > self._size:
            yield from self._cut()

    def finish(self) -> Iterator[Block]:
        """Yield the rest, at most one block."""
        if self._pending:
            yield slice_documents(join_blocks(self._pending), 0, self._pending_documents)
            self._pending, self._pending_documents, self._pending_bytes = [], 0, 0

    def _cut(self) -> Iterator[Block]:
        joined = join_blocks(self._pending)
        ends = starts_of(document_lengths(joined) * joined.tokens.itemsize)
        start, total = 0, joined.num_documents
        while start < total:
            fitting = int(np.searchsorted(ends, ends[start] + self._size, side="right")) - 1
            stop = min(max(fitting, start + 1), start + self._documents)
            if stop >= total:
                break  # the next document may still fit into this block
            yield slice_documents(joined, start, stop)
            start = stop
        rest = [slice_documents(joined, start, total)] if start < total else []
        self._pending = rest
        self._pending_documents = total - start
        self._pending_bytes = sum(block.tokens.nbytes for block in rest)
