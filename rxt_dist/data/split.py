"""The index of a whole split: all that planning and finding documents needs, shared by its readers.

Shape legend: D documents (or conversations), I interactions, K blocks, n of something looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rxt_dist.data.blocks import starts_of
from rxt_dist.data.files import DatasetFiles
from rxt_dist.data.index import UInt32Array
from rxt_dist.data.manifest import Split

Int64Array = npt.NDArray[np.int64]

_NOTHING = np.zeros(0, dtype=np.uint32)


@dataclass(frozen=True, eq=False)
class SplitIndex:
    """Lengths and places of everything in a split; nothing of it changes."""

    blocks: npt.NDArray[Any]
    """[K] of BLOCK_DTYPE; offsets count from the beginning of each shard."""
    document_tokens: UInt32Array
    """[D] tokens of every document; of all segments of a conversation."""
    interactions: UInt32Array
    """[D] interactions of every conversation; [0] for text."""
    system_tokens: UInt32Array
    """[D] tokens of the system segment, 0 = none; [0] for text."""
    query_tokens: UInt32Array
    """[I]; [0] for text."""
    answer_tokens: UInt32Array
    """[I]; [0] for text."""
    interaction_starts: Int64Array
    """[D + 1] number of the first interaction of every conversation, ends with I."""
    document_offsets: npt.NDArray[np.unsignedinteger[Any]]
    """[D] tokens before each document in its block."""
    _shard_blocks: Int64Array
    _block_documents: Int64Array
    _interaction_token_starts: Int64Array

    @classmethod
    def load(cls, files: DatasetFiles, split: Split, *, skip_corrupt: bool) -> Self:
        """The index of ``split``. Raises DataError as :meth:`DatasetFiles.split_index` does."""
        index = files.split_index(split, skip_corrupt=skip_corrupt)
        shards = files.manifest.shards_of(split)
        query, answer, interactions, system = (
            _NOTHING if column is None else column
            for column in (index.query_tokens, index.answer_tokens, index.interactions, index.system_tokens)
        )
        block_documents = starts_of(index.blocks["documents"])
        return cls(
            blocks=index.blocks,
            document_tokens=index.document_tokens,
            interactions=interactions,
            system_tokens=system,
            query_tokens=query,
            answer_tokens=answer,
            interaction_starts=starts_of(interactions),
            document_offsets=_offsets(index.document_tokens, block_documents),
            _shard_blocks=starts_of(np.array([shard.blocks for shard in shards], dtype=np.int64)),
            _block_documents=block_documents,
            _interaction_token_starts=starts_of(query.astype(np.int64) + answer),
        )

    def locate_interactions(self, numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Conversation of each interaction (numbered over the split), and the offset of its query in
        that conversation's tokens: two int64 [n]."""
        conversations = np.searchsorted(self.interaction_starts, numbers, side="right") - 1
        first = self.interaction_starts[conversations]
        offsets = self._interaction_token_starts[numbers] - self._interaction_token_starts[first]
        return conversations, offsets + self.system_tokens[conversations]

    def block_of(self, documents: Int64Array) -> Int64Array:
        """Block of each document: int64 [n]."""
        return np.searchsorted(self._block_documents, documents, side="right") - 1

    def shard_of(self, blocks: Int64Array) -> Int64Array:
        """Shard of each block: int64 [n]."""
        return np.searchsorted(self._shard_blocks, blocks, side="right") - 1

    def place(self, block: int) -> tuple[int, int]:
        """Shard of a block, and the number of the block in it."""
        shard = int(np.searchsorted(self._shard_blocks, block, side="right")) - 1
        return shard, block - int(self._shard_blocks[shard])

    def blocks_of(self, shard: int) -> npt.NDArray[Any]:
        """The rows of a shard's blocks."""
        return self.blocks[self._shard_blocks[shard] : self._shard_blocks[shard + 1]]

    def documents_of(self, block: int) -> slice:
        """The documents of a block."""
        return slice(int(self._block_documents[block]), int(self._block_documents[block + 1]))


def _offsets(tokens: UInt32Array, block_documents: Int64Array) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Tokens before each document in its block: [D], in the least type that holds them."""
    starts = starts_of(tokens)
    starts -= np.repeat(starts[block_documents], np.diff(block_documents, append=len(starts)))
    return starts[:-1].astype(np.min_scalar_type(int(starts[:-1].max(initial=0))))
