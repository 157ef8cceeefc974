"""What a stage trains on: micro-batches of this rank, their data state, and the STM that lanes carry."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from rxt_dist.checkpoint import CheckpointReader, TrainerState
from rxt_dist.checkpoint.fragments import Fragment
from rxt_dist.config import RunConfig, SpecialTokens, StageConfig
from rxt_dist.config.mesh import micro_units
from rxt_dist.config.run import stage_window
from rxt_dist.config.stage import ANSWER_STAGES
from rxt_dist.data.conversations import Conversations, MixedConversations, conversation_datasets
from rxt_dist.data.lane_loader import LaneLoader, WindowBatch, WindowStep
from rxt_dist.data.lanes import LaneState
from rxt_dist.data.loader import TextLoader, TextStep
from rxt_dist.data.mixing import MixCursor, MixedPieces
from rxt_dist.data.pieces import BlockId, InteractionPieces
from rxt_dist.data.prefetch import PrefetchedLoader
from rxt_dist.errors import CheckpointError, DataError
from rxt_dist.parallel.bootstrap import World
from rxt_dist.randomness import derive_key
from rxt_dist.stages import Pieces
from rxt_dist.train.corrupt import CorruptBlocks

DataState = dict[str, Any]
_CORRUPT_BLOCKS = "corrupt_blocks"
_NEXT_EPOCH = "next_epoch"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One optimizer step of this rank."""

    batches: Sequence[Any]
    counts: dict[str, int]
    """Global counts of the step, without what lies in damaged blocks."""
    state: DataState
    """Data state after the step, plain data."""
    wait_seconds: float
    corrupt_blocks: int
    """Damaged blocks that were left out so far in the run, over all ranks."""


class Feed:
    """Endless steps of one rank, from a data state on; in the text stages nothing is carried between them."""

    def __init__(self, loader: PrefetchedLoader[Any], corrupt: CorruptBlocks) -> None:
        self._loader = loader
        self._corrupt = corrupt

    def next_step(self) -> Step:
        """The next step; the STM of lanes is changed only by :meth:`carry`. Collective if damaged blocks are
        skipped."""
        step: TextStep | WindowStep = next(self._loader)
        counts = self._corrupt.agree(step.counts, step.lost, step.damage)
        blocks = self._corrupt.blocks
        position = step.cursor if isinstance(step, TextStep) else step.state
        state = {**position.to_dict(), _CORRUPT_BLOCKS: [list(block) for block in blocks]}
        return Step(step.batches, counts, state, step.wait_seconds, len(blocks))

    def close(self) -> None:
        """Stop the loader's thread."""
        self._loader.close()

    def stm(self, batch: Any) -> torch.Tensor | None:
        """What the lanes of ``batch`` carry, fp32 [L, lanes, S, D]; None in stages without lanes."""
        return None

    def carry(self, batch: Any, stm: torch.Tensor | None) -> None:
        """Keep what the lanes of ``batch`` carry to their next window."""
        assert stm is None

    def fragments(self) -> dict[str, Fragment]:
        """Carried memory of this rank's lanes for a checkpoint, by lane; empty without lanes."""
        return {}

    def restore(self, reader: CheckpointReader) -> None:
        """Take the carried memory of this rank's lanes from a checkpoint of any mesh."""
        assert not self.fragments()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LaneFeed(Feed):
    """Windows of conversation lanes; each of this rank's lanes carries its STM from window to window."""

    def __init__(
        self,
        loader: LaneLoader,
        corrupt: CorruptBlocks,
        first_lane: int,
        stm: torch.Tensor,
        *,
        saves: bool,
    ) -> None:
        """``stm`` fp32 [L, lanes of this rank, S, D]; its values matter only after :meth:`restore`, because
        a conversation starts from a fresh one. ``saves``: whether this rank is the first that has them."""
        super().__init__(loader, corrupt)
        self._first_lane = first_lane
        self._stm = stm
        self._saves = saves

    def stm(self, batch: WindowBatch) -> torch.Tensor:
        return self._stm[:, self._columns(batch)]

    def carry(self, batch: WindowBatch, stm: torch.Tensor | None) -> None:
        assert stm is not None
        if stm.shape[1] == self._stm.shape[1]:
            self._stm = stm.detach()
        else:
            self._stm[:, self._columns(batch)] = stm.detach()

    def fragments(self) -> dict[str, Fragment]:
        numel = self._stm[:, 0].numel()
        lanes = range(self._stm.shape[1] if self._saves else 0)
        return {self._key(lane): Fragment.run(numel, 0, self._stm[:, lane].reshape(-1)) for lane in lanes}

    def restore(self, reader: CheckpointReader) -> None:
        read = [torch.empty(values.shape) for values in self._stm.unbind(1)]
        reader.load_fragments(
            {
                self._key(lane): Fragment.run(values.numel(), 0, values.view(-1))
                for lane, values in enumerate(read)
            }
        )
        for lane, values in enumerate(read):
            self._stm[:, lane] = values.to(self._stm.device)

    def _key(self, lane: int) -> str:
        return f"stm.lane-{self._first_lane + lane:06d}"

    def _columns(self, batch: WindowBatch) -> slice:
        """Columns of this rank's STM that the lanes of ``batch`` have: they are consecutive."""
        count = batch.lanes.shape[0]
        first = batch.first_lane - self._first_lane
        return slice(first, first + count)


def open_feed(
    config: RunConfig,
    stage: StageConfig,
    stage_index: int,
    source: Pieces,
    world: World,
    state: DataState | None,
) -> Feed:
    """The feed of a stage on this rank; ``state`` None starts at its beginning. Collective.

    Raises:
        DataError: the state does not fit the data.
    """
    special = config.model.special_tokens
    assert isinstance(special, SpecialTokens)
    key = derive_key(config.seed, "stage", stage.name, stage_index)
    micro = micro_units(config, stage, world.dp_size)
    prefetch, pin = config.runtime.data_prefetch_steps, world.device.type == "cuda"
    state = dict(state or {})
    blocks = _corrupt_blocks(state.pop(_CORRUPT_BLOCKS, []))
    source.lose(blocks)
    skip, limit = config.data.on_corrupt == "skip", config.data.max_corrupt_blocks
    corrupt = CorruptBlocks(skip=skip, limit=limit, known=blocks, copies=world.tensor_size)
    if not stage.uses_lanes:
        return Feed(
            TextLoader(
                source,
                key=key,
                packs=config.batch.packs,
                pack_tokens=config.batch.pack_tokens,
                micro_packs=micro,
                dp_rank=world.dp_rank,
                dp_size=world.dp_size,
                masking_probability=stage.masking_probability,
                mask_id=special.mask,
                cursor=_cursor(source, state),
                prefetch_steps=prefetch,
                pin_memory=pin,
            ),
            corrupt,
        )
    assert isinstance(source, InteractionPieces | MixedConversations)
    assert config.batch.lanes is not None
    report_shares(source)
    for part in conversation_datasets(source)[0]:
        _report_prompts(part, stage)
    share = config.batch.lanes // world.dp_size
    model = config.model
    loader = LaneLoader(
        source,
        key=key,
        lanes=config.batch.lanes,
        micro_lanes=micro,
        window=stage_window(config, stage),
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        pad_id=special.pad,
        stm_size=model.stm_size,
        look_back=stage.name in ANSWER_STAGES,
        system_prompts=stage.system_prompts,
        state=_lane_state(source, config.batch.lanes, state),
        prefetch_steps=prefetch,
        pin_memory=pin,
    )
    shape = (model.decoder.num_layers, share, model.stm_size, model.embed_dim)
    stm = torch.zeros(shape, device=world.device)
    return LaneFeed(loader, corrupt, world.dp_rank * share, stm, saves=world.is_first_of_tensor_group)


def resumed_data_state(state: TrainerState, fingerprint: str, *, accept_changed: bool) -> DataState:
    """Where a stage that is resumed goes on in its data: at the position in ``state``, or, where the data now
    has another ``fingerprint``, at the beginning of an epoch that was not begun.

    Raises:
        CheckpointError: the data has changed and that is not accepted.
    """
    if state.fingerprint == fingerprint:
        return state.data_state
    found = (
        f"the dataset of stage {state.stage_name} has fingerprint {fingerprint[:12]}; the checkpoint was "
        f"made with {state.fingerprint[:12]}"
    )
    if not accept_changed:
        raise CheckpointError(
            f"{found}: give the dataset the run was started with, or set data.accept_changed to go on with "
            "this one at its next epoch"
        )
    logger.warning("%s: going on with this one at its next epoch", found)
    places = state.data_state.get("datasets", [state.data_state])
    return next_stage_state(state.data_state) | {_NEXT_EPOCH: 1 + max(place["epoch"] for place in places)}


def next_stage_state(state: DataState | None) -> DataState:
    """What the data state of a stage leaves to the next one, which begins its data anew."""
    return {name: value for name, value in (state or {}).items() if name == _CORRUPT_BLOCKS}


def _cursor(source: Pieces, state: DataState) -> MixCursor | None:
    if _NEXT_EPOCH in state:
        parts = len(source.parts) if isinstance(source, MixedPieces) else 1
        return MixCursor.initial(parts, state[_NEXT_EPOCH])
    return MixCursor.from_dict(state) if state else None


def _lane_state(source: Conversations, lanes: int, state: DataState) -> LaneState | None:
    if _NEXT_EPOCH in state:
        return LaneState.initial(lanes, len(conversation_datasets(source)[0]), state[_NEXT_EPOCH])
    return LaneState.from_dict(state) if state else None


def _corrupt_blocks(value: Any) -> list[BlockId]:
    """Raises DataError if the entry of the data state is not a list of pairs."""
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and [type(part) for part in pair] == [str, int] for pair in pairs):
        valid = "a list of [fingerprint of a dataset, block]"
        raise DataError(f"data state: found corrupt_blocks {value!r}, valid is {valid}")
    return [(dataset, block) for dataset, block in pairs]


def report_shares(source: Conversations) -> None:
    """Say what the weights of several datasets, which count conversations, are in interactions."""
    parts, weights = conversation_datasets(source)
    if len(parts) == 1:
        return
    means = [part.interaction_counts.mean() for part in parts]
    total = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    for part, weight, mean in zip(parts, weights, means, strict=True):
        logger.info(
            "%s: %.1f %% of the conversations, %.1f %% of the interactions of this stage",
            part.dataset.name,
            100 * weight / sum(weights),
            100 * weight * mean / total,
        )


def _report_prompts(source: InteractionPieces, stage: StageConfig) -> None:
    """Say what of the dataset's system prompts the stage does not read."""
    prompts = source.dataset.system_tokens
    count, cut = np.count_nonzero(prompts), np.count_nonzero(prompts > source.seq_len)
    if stage.name in ANSWER_STAGES and count and not stage.system_prompts:
        logger.warning(
            "%s: %d train conversations have a system prompt that is not read; set system_prompts: true in "
            "stage %s to make it part of what is remembered",
            source.dataset.name,
            count,
            stage.name,
        )
    elif stage.system_prompts and cut:
        logger.warning(
            "%s: %d of %d train system prompts are longer than seq_len %d and are cut",
            source.dataset.name,
            cut,
            count,
            source.seq_len,
        )
