"""Batches of the text stages: flat tokens plus the index lists of what is masked and supervised.

The masked-LM mask and the token keys are pure functions of (stage key, epoch, piece, position), so a
token is masked the same way whatever pack, micro-batch or rank it lands in. For the same reason the
global counts of a step follow from piece lengths alone, without reading other ranks' tokens.

Shape legend: n pieces, N tokens, m masked tokens, t supervised next tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from rxt_dist.data.order import Int64Array, Pack
from rxt_dist.data.pieces import PieceSource
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.randomness import UInt64Array, derive_key, fold_in

_COUNT_CHUNK = 1 << 15  # tokens hashed at once: the temporaries stay in the processor's cache


class TensorRecord:
    """Base of frozen dataclasses that hold tensors, layouts, and records of them or tuples of records."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy of the record with every tensor on ``device``."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy in page-locked memory (a CUDA device must be present)."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> Self:
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (torch.Tensor, SequenceLayout, TensorRecord)):
                changed[field.name] = change(value)
            elif isinstance(value, tuple):
                changed[field.name] = tuple(change(item) for item in value)
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class TextBatch(TensorRecord):
    """One micro-batch of pieces as flat tokens; every tensor is int64."""

    tokens: torch.Tensor
    """[N] the real tokens."""
    masked_tokens: torch.Tensor
    """[N] the same with masked tokens replaced by the mask id: the encoder's input of the masked-LM loss."""
    layout: SequenceLayout
    """One sequence a piece."""
    masked_index: torch.Tensor
    """[m] rows that are masked, ascending."""
    masked_targets: torch.Tensor
    """[m] the real tokens of those rows."""
    next_index: torch.Tensor
    """[t] rows whose next token is supervised, ascending."""
    next_targets: torch.Tensor
    """[t] those next tokens."""
    token_keys: torch.Tensor
    """[N] key of every token for counter-based randomness (64 bits, signed)."""


@dataclass(frozen=True)
class MaskPlan:
    """What decides which tokens are masked: the stage's key and the probability of every token."""

    key: int
    probability: float

    def threshold(self) -> np.uint64:
        """A token is masked when the upper 53 bits of its mask key are below this: uniform < probability."""
        return np.uint64(np.ceil(self.probability * 2.0**53))


def piece_positions(lengths: Int64Array) -> Int64Array:
    """Position of every token in its own piece: int64 [sum of lengths]."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)


def piece_keys(key: int, epochs: npt.ArrayLike, pieces: npt.ArrayLike) -> UInt64Array:
    """One key for every visit of a piece: uint64 [n]."""
    return fold_in(fold_in(key, epochs), pieces)


def _masked(plan: MaskPlan, pack: Pack, lengths: Int64Array, positions: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether each token of ``pack`` is masked: bool [N]."""
    keys = np.repeat(piece_keys(derive_key(plan.key, "mask"), pack.epochs, pack.pieces), lengths)
    return np.asarray((fold_in(keys, positions) >> np.uint64(11)) < plan.threshold())


def count_masked(plan: MaskPlan, pack: Pack, lengths: Int64Array) -> int:
    """Number of masked tokens of ``pack`` whose pieces have ``lengths`` [n], without reading tokens."""
    total = 0
    chunk_of_piece = (np.cumsum(lengths) - lengths) // _COUNT_CHUNK
    cuts = np.flatnonzero(np.diff(chunk_of_piece)) + 1
    for start, stop in zip([0, *cuts], [*cuts, len(lengths)], strict=True):
        part = Pack(pack.pieces[start:stop], pack.epochs[start:stop])
        positions = piece_positions(lengths[start:stop])
        total += int(np.count_nonzero(_masked(plan, part, lengths[start:stop], positions)))
    return total


def count_pack(source: PieceSource, pack: Pack, plan: MaskPlan) -> dict[str, int]:
    """Counts of ``pack`` from lengths and keys: "tokens", "masked" and "next" (supervised next tokens)."""
    lengths = source.lengths[pack.pieces].astype(np.int64)
    return {
        "tokens": int(lengths.sum()),
        "masked": count_masked(plan, pack, lengths),
        "next": int(source.supervised[pack.pieces].sum(dtype=np.int64)),
    }


def supervised_rows(lengths: Int64Array, supervised: Int64Array) -> Int64Array:
    """Flat rows whose next token is a target, when the last ``supervised`` [n] tokens of each sequence
    of ``lengths`` [n] are the targets: int64 [sum of supervised], ascending."""
    first = np.cumsum(lengths) - supervised - 1
    return np.repeat(first, supervised) + piece_positions(supervised)


def build_text_batch(source: PieceSource, pack: Pack, plan: MaskPlan, mask_id: int) -> TextBatch:
    """Read the pieces of ``pack`` and lay them out as one micro-batch on the CPU.

    An empty pack becomes a single mask token that nothing is asked of, because a stage needs a sequence.

    Raises:
        DataError: a shard that holds one of the pieces is missing or damaged.
    """
    if not len(pack.pieces):
        return _empty_batch(mask_id)
    lengths = source.lengths[pack.pieces].astype(np.int64)
    supervised = source.supervised[pack.pieces].astype(np.int64)
    tokens = source.read_tokens(pack.pieces)
    positions = piece_positions(lengths)
    masked_index = np.flatnonzero(_masked(plan, pack, lengths, positions))
    masked_tokens = tokens.copy()
    masked_tokens[masked_index] = mask_id
    next_index = supervised_rows(lengths, supervised)
    keys = np.repeat(piece_keys(derive_key(plan.key, "token"), pack.epochs, pack.pieces), lengths)
    return TextBatch(
        tokens=torch.from_numpy(tokens),
        masked_tokens=torch.from_numpy(masked_tokens),
        layout=SequenceLayout.from_lengths(lengths, torch.device("cpu")),
        masked_index=torch.from_numpy(masked_index),
        masked_targets=torch.from_numpy(tokens[masked_index]),
        next_index=torch.from_numpy(next_index),
        next_targets=torch.from_numpy(tokens[next_index + 1]),
        token_keys=torch.from_numpy(fold_in(keys, positions).view(np.int64)),
    )


def _empty_batch(mask_id: int) -> TextBatch:
    token, nothing = torch.tensor([mask_id]), torch.zeros(0, dtype=torch.int64)
    layout = SequenceLayout.from_lengths([1], torch.device("cpu"))
    return TextBatch(
        token, token.clone(), layout, nothing, nothing, nothing, nothing, torch.zeros_like(token)
    )
