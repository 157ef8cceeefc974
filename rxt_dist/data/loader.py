"""From the global order to the micro-batches of one rank, for the text stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from rxt_dist.data.batch import MaskPlan, TextBatch, build_text_batch, count_pack
from rxt_dist.data.mixing import MixCursor, PackMixer, mixed_in_index_order
from rxt_dist.data.order import Pack, concatenate_packs
from rxt_dist.data.pieces import BlockId, PieceSource
from rxt_dist.data.prefetch import PrefetchedLoader
from rxt_dist.errors import ConfigError


@dataclass(frozen=True)
class TextStep:
    """What one rank processes in one optimizer step."""

    batches: list[TextBatch]
    """Micro-batches of this rank, in order."""
    counts: dict[str, int]
    """Counts of the whole step over all ranks: "tokens", "masked", "next"; as planned from the index."""
    cursor: MixCursor
    """State after this step: a loader that starts from it continues with the next step."""
    lost: dict[str, int]
    """What of the counts this rank left out because its block is damaged."""
    damage: Mapping[BlockId, str]
    """The damaged blocks that this rank has met up to this step, each with a sentence."""
    wait_seconds: float = field(default=0.0, compare=False)
    """Seconds that the training loop waited for this step's data."""


class TextLoader(PrefetchedLoader[TextStep]):
    """Endless iterator over the steps of one rank.

    A global step is ``packs`` consecutive packs of the global order; rank r takes packs
    [r packs/dp_size, (r+1) packs/dp_size) and processes ``micro_packs`` of them at once. Neither
    ``dp_size`` nor ``micro_packs`` changes what the step holds. Steps are built by a background thread,
    ``prefetch_steps`` ahead; call :meth:`close` (or use ``with``) when done.
    """

    def __init__(
        self,
        source: PieceSource,
        *,
        key: int,
        packs: int,
        pack_tokens: int,
        micro_packs: int,
        dp_rank: int,
        dp_size: int,
        masking_probability: float,
        mask_id: int,
        cursor: MixCursor | None = None,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """``key`` identifies the stage of the run: order, masks and token keys derive from it.

        Raises:
            ConfigError: ``packs`` is not a multiple of ``dp_size * micro_packs``.
            DataError: a piece is longer than ``pack_tokens``.
        """
        if packs < 1 or micro_packs < 1 or packs % (dp_size * micro_packs):
            raise ConfigError(
                f"batch.packs: {packs} must be a positive multiple of dp x batch.micro_packs = "
                f"{dp_size} x {micro_packs}"
            )
        share = packs // dp_size
        plan = _RankPlan(
            source=source,
            mixer=PackMixer(source, key=key, pack_tokens=pack_tokens),
            masks=MaskPlan(key, masking_probability),
            mask_id=mask_id,
            packs=packs,
            micro_batches=[
                range(start, start + micro_packs)
                for start in range(dp_rank * share, (dp_rank + 1) * share, micro_packs)
            ],
            pin_memory=pin_memory and torch.cuda.is_available(),
        )
        super().__init__(plan.steps(cursor or plan.mixer.first()), prefetch_steps)


@dataclass(frozen=True)
class _RankPlan:
    """Everything that decides what one rank reads; the background thread holds nothing else."""

    source: PieceSource
    mixer: PackMixer
    masks: MaskPlan
    mask_id: int
    packs: int
    micro_batches: list[range]
    """Packs of the step that form each micro-batch of this rank."""
    pin_memory: bool

    def steps(self, cursor: MixCursor) -> Iterator[TextStep]:
        """The endless steps of this rank from ``cursor`` on."""
        while True:
            packs, cursor = self.mixer.next_packs(cursor, self.packs)
            counts = count_pack(self.source, concatenate_packs(packs), self.masks)
            lost = dict.fromkeys(counts, 0)
            batches = []
            for members in self.micro_batches:
                pack, left_out = _readable(self.source, concatenate_packs([packs[i] for i in members]))
                if left_out is not None:
                    missing = count_pack(self.source, left_out, self.masks)
                    lost = {name: lost[name] + missing[name] for name in lost}
                batch = build_text_batch(self.source, pack, self.masks, self.mask_id)
                batches.append(batch.pin_memory() if self.pin_memory else batch)
            yield TextStep(batches, counts, cursor, lost, self.source.damage())


def _readable(source: PieceSource, pack: Pack) -> tuple[Pack, Pack | None]:
    """The pieces of ``pack`` that can be read, and those in damaged blocks, if there are any."""
    lost = source.lost(pack.pieces)
    if not lost.any():
        return pack, None
    return Pack(pack.pieces[~lost], pack.epochs[~lost]), Pack(pack.pieces[lost], pack.epochs[lost])


def evaluation_batches(
    source: PieceSource,
    *,
    key: int,
    pack_tokens: int,
    dp_rank: int,
    dp_size: int,
    masking_probability: float,
    mask_id: int,
    max_packs: int | None,
) -> Iterator[TextBatch | None]:
    """One fixed pass over all pieces in index order, cut into packs that are dealt to the ranks in turn.

    Every rank gets the same number of items: batch i of rank r is pack ``i dp_size + r``, or None when
    there is no such pack, or nothing of it can be read (see :meth:`PieceSource.lost`). ``max_packs`` limits
    the packs of all ranks together (None: the whole split).
    The content is the same for every ``dp_size`` and at every call.

    Raises:
        DataError: a piece is longer than ``pack_tokens``, or a shard is missing or damaged.
    """
    packs = itertools.islice(mixed_in_index_order(source, pack_tokens), max_packs)
    masks = MaskPlan(key, masking_probability)
    while row := list(itertools.islice(packs, dp_size)):
        pack = _readable(source, row[dp_rank])[0] if dp_rank < len(row) else None
        if pack is None or not len(pack.pieces):
            yield None
        else:
            yield build_text_batch(source, pack, masks, mask_id)
