"""From the lane schedule to the windows of one rank, for the conversation stages.

Shape legend: G lanes of the run, b lanes of a micro-batch, W positions of a window, N tokens of one
position, t supervised tokens of one position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from rxt_dist.data.batch import TensorRecord, piece_positions, supervised_rows
from rxt_dist.data.conversations import Conversations, conversation_datasets
from rxt_dist.data.lanes import BoolArray, LaneSchedule, LaneState, LaneWindow
from rxt_dist.data.order import Int64Array
from rxt_dist.data.pieces import BlockId
from rxt_dist.data.prefetch import PrefetchedLoader
from rxt_dist.errors import ConfigError
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.randomness import derive_key, fold_in


@dataclass(frozen=True)
class LaneInteractions(TensorRecord):
    """One interaction of every lane of a micro-batch: sequence i of the layout belongs to lane i."""

    tokens: torch.Tensor
    """int64 [N] queries and answers, special tokens included."""
    layout: SequenceLayout
    token_keys: torch.Tensor
    """int64 [N] counter-based key of every token: of (stage key, visit, interaction, position)."""
    next_index: torch.Tensor
    """int64 [t] rows whose next token is supervised: every answer token, [A] and [EOS] included."""
    next_targets: torch.Tensor
    """int64 [t] those next tokens."""
    target_marks: torch.Tensor
    """uint8 [t] d >= 1: the target can only be known from the interaction d interactions earlier."""
    present: torch.Tensor
    """bool [b] False where the lane has nothing to read here, or only a damaged block: its sequence is then a
    single [PAD], because a sequence without keys has no defined attention, and nothing of it may be used."""
    reset: torch.Tensor
    """bool [b] a conversation begins here: it reads a fresh STM."""
    visits: torch.Tensor
    """int64 [b] number of the conversation in the endless stream; keys the fresh STM."""
    numbers: torch.Tensor
    """int64 [b] number of the interaction in its conversation, from 0; -1 for a system prompt."""


_JOINED = ("tokens", "token_keys", "next_targets", "target_marks", "present", "reset", "visits", "numbers")


def side_by_side(interactions: Sequence[LaneInteractions]) -> LaneInteractions:
    """Those of P positions as if P x b lanes had one each: sequence ``p * b + i`` is lane i at position p."""
    if len(interactions) == 1:
        return interactions[0]
    first_rows = accumulate((at.tokens.shape[0] for at in interactions[:-1]), initial=0)
    index = [at.next_index + row for at, row in zip(interactions, first_rows, strict=True)]
    joined = {name: torch.cat([getattr(at, name) for at in interactions]) for name in _JOINED}
    layout = SequenceLayout.side_by_side([at.layout for at in interactions])
    return LaneInteractions(layout=layout, next_index=torch.cat(index), **joined)


@dataclass(frozen=True)
class WindowBatch(TensorRecord):
    """A window of consecutive interactions of b lanes."""

    lanes: torch.Tensor
    """int64 [b] global numbers of the lanes: consecutive, ascending."""
    first_lane: int
    """The first of them, on the host."""
    look_backs: tuple[LaneInteractions, ...]
    """W of them: what is written before each position (nothing supervised), which is the interaction before
    it, or the system prompt of a conversation that begins there; absent in lanes that have neither. Empty if
    the loader was told not to read them."""
    positions: tuple[LaneInteractions, ...]
    """W of them, present in every lane but for damaged blocks."""


@dataclass(frozen=True)
class WindowStep:
    """What one rank processes in one optimizer step."""

    batches: list[WindowBatch]
    """Micro-batches of this rank, in the order of their lanes."""
    counts: dict[str, int]
    """Counts of the whole step over all ranks: "tokens", "answer" (supervised tokens), "slots" (STM slots
    whose position holds a token), "interactions" and "resets"; as planned from the index. The look-back is
    not counted."""
    position_counts: list[dict[str, int]]
    """The same for each of the W positions; they sum to ``counts``."""
    state: LaneState
    """State after this step: a loader that starts from it continues with the next step."""
    lost: dict[str, int]
    """What of the counts this rank left out because its block is damaged."""
    damage: Mapping[BlockId, str]
    """The damaged blocks that this rank has met up to this step, each with a sentence."""
    wait_seconds: float = field(default=0.0, compare=False)
    """Seconds that the training loop waited for this step's data."""


class LaneLoader(PrefetchedLoader[WindowStep]):
    """Endless iterator over the windows of one rank.

    The run has ``lanes`` lanes; rank r owns lanes [r lanes/dp_size, (r+1) lanes/dp_size) and processes
    ``micro_lanes`` of them at once. Neither ``dp_size`` nor ``micro_lanes`` changes what the step holds.
    Steps are built by a background thread, ``prefetch_steps`` ahead; call :meth:`close` (or use ``with``)
    when done.
    """

    def __init__(
        self,
        source: Conversations,
        *,
        key: int,
        lanes: int,
        micro_lanes: int,
        window: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
        stm_size: int,
        look_back: bool = True,
        system_prompts: bool = False,
        state: LaneState | None = None,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """``key`` identifies the stage of the run: schedule and token keys derive from it. ``stm_size``
        bounds the "slots" that an interaction counts for. ``look_back``: also read what is written before
        each position, for stages that carry the STM from before a write; with ``system_prompts`` the
        system prompts of conversations are among it.

        Raises:
            ConfigError: ``lanes`` is not a multiple of ``dp_size * micro_lanes``, or ``window`` < 1.
        """
        if lanes < 1 or micro_lanes < 1 or lanes % (dp_size * micro_lanes):
            raise ConfigError(
                f"batch.lanes: {lanes} must be a positive multiple of dp x batch.micro_lanes = "
                f"{dp_size} x {micro_lanes}"
            )
        if window < 1:
            raise ConfigError(f"window: found {window}, valid is 1 or more interactions")
        share = lanes // dp_size
        plan = _RankPlan(
            source=source,
            schedule=lane_schedule(source, key=key, lanes=lanes),
            token_key=derive_key(key, "token"),
            window=window,
            micro_batches=[
                np.arange(start, start + micro_lanes)
                for start in range(dp_rank * share, (dp_rank + 1) * share, micro_lanes)
            ],
            pad_id=pad_id,
            stm_size=stm_size,
            look_back=look_back,
            system_prompts=system_prompts,
            pin_memory=pin_memory and torch.cuda.is_available(),
        )
        first = LaneState.initial(lanes, len(conversation_datasets(source)[0])) if state is None else state
        super().__init__(plan.steps(first), prefetch_steps)


def lane_schedule(source: Conversations, *, key: int, lanes: int) -> LaneSchedule:
    """The schedule of ``lanes`` over the datasets of ``source``."""
    parts, weights = conversation_datasets(source)
    sizes = [len(part.interaction_counts) for part in parts]
    return LaneSchedule(source.interaction_counts, key=key, lanes=lanes, sizes=sizes, weights=weights)


@dataclass(frozen=True)
class _RankPlan:
    """Everything that decides what one rank reads; the background thread holds nothing else."""

    source: Conversations
    schedule: LaneSchedule
    token_key: int
    window: int
    micro_batches: list[Int64Array]
    """Lanes of each micro-batch of this rank."""
    pad_id: int
    stm_size: int
    look_back: bool
    system_prompts: bool
    pin_memory: bool

    def steps(self, state: LaneState) -> Iterator[WindowStep]:
        """The endless steps of this rank from ``state`` on."""
        while True:
            window, state = self.schedule.next_window(state, self.window)
            everywhere = np.ones(window.interactions.shape, dtype=np.bool_)
            position_counts = self._counts(window, everywhere)
            absent = np.zeros_like(everywhere)
            batches = []
            for lanes in self.micro_batches:
                batch = self._batch(window, lanes)
                absent[lanes] = ~np.stack([at.present.numpy() for at in batch.positions], axis=1)
                batches.append(batch.pin_memory() if self.pin_memory else batch)
            lost = _total(self._counts(window, absent))
            damage = self.source.damage()
            yield WindowStep(batches, _total(position_counts), position_counts, state, lost, damage)

    def _pieces(self, window: LaneWindow) -> Int64Array:
        """Piece of every lane and position: int64 [G, W]."""
        return self.source.interaction_starts[window.conversations] + window.interactions

    def _counts(self, window: LaneWindow, where: BoolArray) -> list[dict[str, int]]:
        """Counts of each position, over the lanes in which ``where`` [G, W] is set."""
        pieces = self._pieces(window)
        lengths = self.source.lengths[pieces]
        columns = {
            "tokens": lengths.sum(axis=0, dtype=np.int64, where=where),
            "answer": self.source.answer_kept[pieces].sum(axis=0, where=where),
            "slots": np.minimum(lengths, self.stm_size).sum(axis=0, dtype=np.int64, where=where),
            "interactions": where.sum(axis=0),
            "resets": window.resets.sum(axis=0, where=where),
        }
        return [{name: int(column[w]) for name, column in columns.items()} for w in range(self.window)]

    def _batch(self, window: LaneWindow, lanes: Int64Array) -> WindowBatch:
        pieces, conversations = self._pieces(window)[lanes], window.conversations[lanes]
        numbers, visits = window.interactions[lanes], window.visits[lanes]
        look_backs = [
            self._read(
                pieces[:, w] - 1,
                visits=visits[:, w],
                numbers=numbers[:, w] - 1,
                present=numbers[:, w] > 0,
                supervise=False,
                prompts=conversations[:, w] if self.system_prompts else None,
            )
            for w in range(self.window if self.look_back else 0)
        ]
        everywhere = np.ones(len(lanes), dtype=np.bool_)
        positions = [
            self._read(
                pieces[:, w], visits=visits[:, w], numbers=numbers[:, w], present=everywhere, supervise=True
            )
            for w in range(self.window)
        ]
        return WindowBatch(torch.from_numpy(lanes), int(lanes[0]), tuple(look_backs), tuple(positions))

    def _read(self, pieces: Int64Array, **options: Any) -> LaneInteractions:
        return read_interactions(self.source, pieces, token_key=self.token_key, pad_id=self.pad_id, **options)


def read_interactions(
    source: Conversations,
    pieces: Int64Array,
    *,
    visits: Int64Array,
    numbers: Int64Array,
    present: BoolArray,
    token_key: int,
    pad_id: int,
    supervise: bool,
    prompts: Int64Array | None = None,
) -> LaneInteractions:
    """Read one interaction a lane; ``pieces``, ``visits`` and ``numbers`` [b] count where ``present``.

    Where it is not, the system prompt of conversation ``prompts`` [b] is read in its place, if it has one.
    What lies in a damaged block is absent, but a conversation begins all the same.

    Raises:
        DataError: a shard is missing or damaged.
    """
    begins = present & (numbers == 0)
    prompted = np.zeros(len(pieces), dtype=np.bool_)
    if prompts is not None:
        prompted = ~present & (source.prompt_kept[prompts] > 0)
        prompted[prompted] = ~source.lost_conversations(prompts[prompted])
    present = present.copy()
    present[present] = ~source.lost(pieces[present])
    spoken = pieces[present]
    lengths = np.ones(len(pieces), dtype=np.int64)
    lengths[present] = source.lengths[spoken]
    if prompts is not None:
        lengths[prompted] = source.prompt_kept[prompts[prompted]]
    real = np.repeat(present, lengths)
    tokens = np.full(len(real), pad_id, dtype=np.int64)
    tokens[real] = source.read_tokens(spoken)
    if prompts is not None and prompted.any():
        tokens[np.repeat(prompted, lengths)] = source.read_prompts(prompts[prompted])
    marks = np.zeros(len(real), dtype=np.uint8)
    targets = np.zeros(len(pieces), dtype=np.int64)
    if supervise:
        marks[real] = source.read_marks(spoken)
        targets[present] = source.answer_kept[spoken]
    next_index = supervised_rows(lengths, targets)
    lane_keys = fold_in(fold_in(token_key, visits), numbers)
    token_keys = fold_in(np.repeat(lane_keys, lengths), piece_positions(lengths))
    return LaneInteractions(
        tokens=torch.from_numpy(tokens),
        layout=SequenceLayout.from_lengths(lengths, torch.device("cpu")),
        token_keys=torch.from_numpy(token_keys.view(np.int64)),
        next_index=torch.from_numpy(next_index),
        next_targets=torch.from_numpy(tokens[next_index + 1]),
        target_marks=torch.from_numpy(marks[next_index + 1]),
        present=torch.from_numpy(present | prompted),
        reset=torch.from_numpy(begins),
        visits=torch.from_numpy(visits.copy()),
        numbers=torch.from_numpy(numbers.copy()),
    )


def _total(counts: list[dict[str, int]]) -> dict[str, int]:
    """Sums over the positions of a window."""
    return {name: sum(count[name] for count in counts) for name in counts[0]}
