"""What a stage trains on: micro-batches of this rank, their data state, and the STM that lanes carry."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from rxt_dist.checkpoint import CheckpointReader
from rxt_dist.checkpoint.fragments import Fragment
from rxt_dist.config import RunConfig, SpecialTokens, StageConfig
from rxt_dist.config.mesh import micro_units
from rxt_dist.data.lane_loader import LaneLoader, WindowBatch
from rxt_dist.data.lanes import LaneState
from rxt_dist.data.loader import TextLoader
from rxt_dist.data.order import PackCursor
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.parallel.bootstrap import World
from rxt_dist.randomness import derive_key

DataState = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One optimizer step of this rank."""

    batches: Sequence[Any]
    counts: dict[str, int]
    """Global counts of the step."""
    state: DataState
    """Data state after the step, plain data."""
    wait_seconds: float


class Feed(ABC):
    """Endless steps of one rank, from a data state on. By default nothing is carried between them."""

    @abstractmethod
    def next_step(self) -> Step:
        """The next step; the STM of lanes is changed only by :meth:`carry`."""

    @abstractmethod
    def close(self) -> None:
        """Stop the loader's thread."""

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


class TextFeed(Feed):
    """Packs of the text stages; nothing is carried."""

    def __init__(self, loader: TextLoader) -> None:
        self._loader = loader

    def next_step(self) -> Step:
        step = next(self._loader)
        return Step(step.batches, step.counts, step.cursor.to_dict(), step.wait_seconds)

    def close(self) -> None:
        self._loader.close()


class LaneFeed(Feed):
    """Windows of conversation lanes; each of this rank's lanes carries its STM from window to window."""

    def __init__(self, loader: LaneLoader, first_lane: int, stm: torch.Tensor) -> None:
        """``stm`` fp32 [L, lanes of this rank, S, D]; its values matter only after :meth:`restore`, because
        a conversation starts from a fresh one."""
        self._loader = loader
        self._first_lane = first_lane
        self._stm = stm

    def next_step(self) -> Step:
        step = next(self._loader)
        return Step(step.batches, step.counts, step.state.to_dict(), step.wait_seconds)

    def close(self) -> None:
        self._loader.close()

    def stm(self, batch: WindowBatch) -> torch.Tensor:
        return self._stm[:, self._columns(batch)]

    def carry(self, batch: WindowBatch, stm: torch.Tensor | None) -> None:
        assert stm is not None
        self._stm[:, self._columns(batch)] = stm.detach()

    def fragments(self) -> dict[str, Fragment]:
        numel = self._stm[:, 0].numel()
        lanes = range(self._stm.shape[1])
        return {self._key(lane): Fragment(numel, 0, self._stm[:, lane].reshape(-1)) for lane in lanes}

    def restore(self, reader: CheckpointReader) -> None:
        read = {
            self._key(lane): Fragment(values.numel(), 0, torch.empty(values.numel()))
            for lane, values in enumerate(self._stm.unbind(1))
        }
        reader.load_fragments(read)
        for lane in range(self._stm.shape[1]):
            stored = read[self._key(lane)].values
            self._stm[:, lane] = stored.view(self._stm[:, lane].shape).to(self._stm.device)

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
    source: TextPieces | InteractionPieces,
    world: World,
    state: DataState | None,
) -> Feed:
    """The feed of a stage on this rank; ``state`` None starts at its beginning."""
    special = config.model.special_tokens
    assert isinstance(special, SpecialTokens)
    key = derive_key(config.seed, "stage", stage.name, stage_index)
    micro = micro_units(config, stage, world.size)
    prefetch, pin = config.runtime.data_prefetch_steps, world.device.type == "cuda"
    if not stage.uses_lanes:
        return TextFeed(
            TextLoader(
                source,
                key=key,
                packs=config.batch.packs,
                pack_tokens=config.batch.pack_tokens,
                micro_packs=micro,
                dp_rank=world.rank,
                dp_size=world.size,
                masking_probability=stage.masking_probability,
                mask_id=special.mask,
                cursor=None if state is None else PackCursor.from_dict(state),
                prefetch_steps=prefetch,
                pin_memory=pin,
            )
        )
    assert isinstance(source, InteractionPieces)
    assert config.batch.lanes is not None
    _report_prompts(source, stage)
    share = config.batch.lanes // world.size
    model = config.model
    loader = LaneLoader(
        source,
        key=key,
        lanes=config.batch.lanes,
        micro_lanes=micro,
        window=config.batch.window,
        dp_rank=world.rank,
        dp_size=world.size,
        pad_id=special.pad,
        stm_size=model.stm_size,
        look_back=stage.name == "smat",
        system_prompts=stage.system_prompts,
        state=None if state is None else LaneState.from_dict(state),
        prefetch_steps=prefetch,
        pin_memory=pin,
    )
    shape = (model.decoder.num_layers, share, model.stm_size, model.embed_dim)
    return LaneFeed(loader, world.rank * share, torch.zeros(shape, device=world.device))


def _report_prompts(source: InteractionPieces, stage: StageConfig) -> None:
    """Say what of the dataset's system prompts stage smat does not read."""
    prompts = source.dataset.system_tokens
    count, cut = np.count_nonzero(prompts), np.count_nonzero(prompts > source.seq_len)
    if stage.name == "smat" and count and not stage.system_prompts:
        logger.warning(
            "%s: %d train conversations have a system prompt that is not read; set system_prompts: true in "
            "stage smat to write it into their memory",
            source.dataset.folder,
            count,
        )
    elif stage.system_prompts and cut:
        logger.warning(
            "%s: %d of %d train system prompts are longer than seq_len %d and are cut",
            source.dataset.folder,
            cut,
            count,
            source.seq_len,
        )
