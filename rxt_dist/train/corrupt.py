"""Damaged blocks of the training data that a run leaves out, the same for all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from rxt_dist.data.pieces import BlockId
from rxt_dist.errors import DataError

logger = logging.getLogger(__name__)

_NAMED = 3  # blocks that an error message lists


class CorruptBlocks:
    """Agrees on what a step leaves out.

    Which pieces a step holds follows from the index, but only the rank that reads a block learns that it is
    damaged. So before a step is computed, the ranks add up what they left out, and every loss is divided by
    what is really there.
    """

    def __init__(self, *, skip: bool, limit: int, known: Iterable[BlockId] = (), copies: int = 1) -> None:
        """``known``: blocks that the run left out before; ``copies``: ranks that read the same part of the
        data. Collective with ``skip``.

        The ranks speak over the host, so that the accelerator's queue is not waited for.
        """
        self._skip = skip
        self._limit = limit
        self._known = dict.fromkeys(known)
        self._copies = copies
        self._group: dist.ProcessGroup | None = None
        if skip and dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    @property
    def blocks(self) -> list[BlockId]:
        """Damaged blocks that any rank has met in this run, in ascending order."""
        return sorted(self._known)

    def agree(
        self, counts: Mapping[str, int], lost: Mapping[str, int], damage: Mapping[BlockId, str]
    ) -> dict[str, int]:
        """The global counts of a step less what all ranks left out of it. Collective if blocks are skipped.

        Args:
            counts: global counts as planned from the index.
            lost: what this rank left out of them.
            damage: the damaged blocks that this rank has met, each with a sentence.

        Raises:
            DataError: on all ranks, when more blocks are damaged than may be left out, or ranks that read
                the same data found different damage.
        """
        if not self._skip:
            return dict(counts)
        new = {block: sentence for block, sentence in damage.items() if block not in self._known}
        sums = torch.tensor([*lost.values(), len(new)])
        if dist.is_initialized():
            dist.all_reduce(sums, group=self._group)
        *missing, found = sums.tolist()
        if found:
            self._add(new)
        if any(value % self._copies for value in missing):
            raise DataError(
                "ranks that share tensors found different blocks damaged; compare the dataset's files on "
                "their machines with rxt-data verify --deep"
            )
        return {name: counts[name] - value // self._copies for name, value in zip(lost, missing, strict=True)}

    def _add(self, new: Mapping[BlockId, str]) -> None:
        gathered: list[Any] = [new]
        if dist.is_initialized():
            gathered *= dist.get_world_size()
            dist.all_gather_object(gathered, new, group=self._group)
        sentences = {block: sentence for part in gathered for block, sentence in part.items()}
        self._known |= dict.fromkeys(sentences)
        if len(self._known) > self._limit:
            named = "; ".join(sentences[block] for block in sorted(sentences)[:_NAMED])
            raise DataError(
                f"data.max_corrupt_blocks: {len(self._known)} blocks of the run's data are damaged, valid "
                f"are at most {self._limit}; the newest: {named}; find all with rxt-data verify --deep"
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            for block in sorted(sentences):
                logger.warning("left out: %s", sentences[block])
