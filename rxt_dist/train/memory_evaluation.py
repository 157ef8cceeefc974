"""Does the memory work? Held-out conversations answered with the true, a fresh and a foreign memory.

*True*: the STM the model wrote from the conversation so far. *Fresh*: an initial STM, as if nothing had
been said. *Foreign*: the STM of another conversation at the same point. If the answers do not need the
memory, or the model does not use it, the three give the same loss.

Shape legend: b conversations of a group, K interactions of the longest conversation, t supervised tokens
of one interaction of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rxt_dist.config import RunConfig, SpecialTokens, StageConfig
from rxt_dist.data.conversations import Conversations, first_conversations
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch, read_interactions
from rxt_dist.data.order import Int64Array
from rxt_dist.parallel.bootstrap import World
from rxt_dist.parallel.collectives import sum_over_ranks
from rxt_dist.parallel.experts import uneven_passes
from rxt_dist.randomness import derive_key
from rxt_dist.stages.context import ContextModule
from rxt_dist.stages.lane_stage import LaneStageModule
from rxt_dist.stages.memory_statistics import MemorySums
from rxt_dist.stages.smat import SmatModule

MEMORIES = ("true", "fresh", "foreign")
MAX_DISTANCE = 32
"""Recall is reported by distance up to this; farther ones are counted with it."""

_SCORED_ROWS = 4096
"""Rows whose logits, in fp32, live at once."""
_LOSS, _CORRECT, _COUNT = range(3)


def evaluate_memory(
    module: SmatModule, source: Conversations, config: RunConfig, world: World
) -> dict[str, Any]:
    """Answer loss and accuracy per supervised token with each memory, and recall of marked tokens.

    ``answer_loss`` and ``answer_accuracy`` are over all interactions with the true memory; ``memory``
    holds, for every memory, the same over the interactions that have a past, plus ``recall`` (accuracy
    on marked tokens; None without marks) and ``recall_by_distance`` {distance: [correct, count]}.
    ``memory_gain`` is the loss with a fresh memory less the loss with the true one. ``by_interaction`` has
    loss and accuracy with each memory for the first, second, ... interaction of a conversation, and
    ``statistics`` those of the memories that the conversations left. A single conversation has no foreign
    memory: its results are None. Collective.
    """
    plan = _plan(source, config, world)
    tally = _Tally(plan.interactions, world.device)
    module.observe(world.device)
    sums = module.memory_sums
    assert sums is not None
    with uneven_passes(module):
        for group in plan.groups:
            _evaluate_group(module, group, source, world, tally, sums)
    statistics = sums.statistics()
    module.observe(None)
    return {**tally.report(foreign=plan.conversations > 1), "statistics": statistics}


def _evaluate_group(
    module: SmatModule,
    group: _Group,
    source: Conversations,
    world: World,
    tally: _Tally,
    sums: MemorySums,
) -> None:
    """Add the answers of a group's conversations, and what they wrote, to ``tally`` and ``sums``."""
    stm = torch.empty(0)
    for number, at in enumerate(group.interactions(source, world.device)):
        fresh = module.fresh.draw(at.visits)
        if number == 0:
            stm = fresh
            if module.system_prompts:
                prompts = group.prompts(source, world.device)
                stm, gates = module.write(stm, module.encode(prompts), prompts)
                sums.add_gates(gates)
        for row, memory in enumerate((stm, fresh, stm.roll(1, dims=1))):
            tally.add(number, row, *_score(module, module.decode(memory, at).hidden, at))
        stm, gates = module.write(stm, module.encode(at), at)
        sums.add_gates(gates)
        sums.add_memory(stm, group.last(number, world.device))


def evaluate_context(
    module: ContextModule, source: Conversations, config: RunConfig, stage: StageConfig, world: World
) -> dict[str, Any]:
    """What :func:`evaluate_memory` gives, with encodings in the place of memories: *true*: those of all
    earlier interactions of the conversation, *fresh*: none, *foreign*: those of another conversation.
    Collective."""
    plan = _plan(source, config, world)
    tally = _Tally(plan.interactions, world.device)
    with uneven_passes(module):
        for group in plan.groups:
            seen = nothing = module.nothing()
            readers = len(group.conversations)
            if stage.system_prompts:
                seen = module.read(seen, group.prompts(source, world.device))
            for number, at in enumerate(group.interactions(source, world.device)):
                for row, memory in enumerate((seen, nothing, seen.of_neighbours(readers))):
                    tally.add(number, row, *_score(module, module.decode(memory, at).hidden, at))
                seen = module.read(seen, at)
    return tally.report(foreign=plan.conversations > 1)


def evaluate_updates(
    module: LaneStageModule, source: Conversations, config: RunConfig, world: World
) -> dict[str, Any]:
    """Loss of the memory update without noise: means over held-out conversations of the terms of stage
    ``memory_attention``, and ``statistics`` of the memories after every update. Collective."""
    names = module.metric_names
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device)
    module.observe(world.device)
    assert module.memory_sums is not None
    for group in _plan(source, config, world).groups:
        stm: torch.Tensor | None = None
        for at in group.interactions(source, world.device):
            stm = module.fresh.draw(at.visits).clone() if stm is None else stm
            batch = WindowBatch(at.visits, 0, (), (at,))
            terms, stm = module.run(batch, stm)
            counts = module.local_counts(batch)
            for row, name in enumerate(names):
                sums[row, 0] += terms[name].total.double()
                sums[row, 1] += counts[terms[name].count]
    statistics = module.memory_sums.statistics()
    module.observe(None)
    sum_over_ranks(sums)
    means = {name: total / max(1.0, count) for name, (total, count) in zip(names, sums.tolist(), strict=True)}
    loss = sum(module.weights[name] * mean for name, mean in means.items())
    return {"loss": loss, **means, "statistics": statistics}


@dataclass(frozen=True)
class _Group:
    """Conversations that are evaluated side by side, longest first so that those that end come last."""

    conversations: Int64Array
    counts: Int64Array
    """Interactions of each."""
    key: int
    pad_id: int

    def interactions(self, source: Conversations, device: torch.device) -> Iterator[LaneInteractions]:
        """First, second, ... interactions; a conversation that has ended is absent."""
        starts = source.interaction_starts[self.conversations]
        for number in range(int(self.counts.max())):
            yield self._read(source, starts + number, number, self.counts > number).to(device)

    def prompts(self, source: Conversations, device: torch.device) -> LaneInteractions:
        """The system prompts; a conversation without one is absent."""
        nothing = np.zeros(len(self.counts), dtype=np.bool_)
        return self._read(source, self.counts, -1, nothing, prompts=self.conversations).to(device)

    def last(self, number: int, device: torch.device) -> torch.Tensor:
        """bool [b]: interaction ``number`` is the last one of its conversation."""
        return torch.from_numpy(self.counts == number + 1).to(device)

    def _read(
        self, source: Conversations, pieces: Int64Array, number: int, present: Any, **options: Any
    ) -> LaneInteractions:
        return read_interactions(
            source,
            pieces,
            visits=self.conversations,
            numbers=np.full(len(pieces), number, dtype=np.int64),
            present=present,
            token_key=self.key,
            pad_id=self.pad_id,
            supervise=number >= 0,
            **options,
        )


@dataclass(frozen=True)
class _Plan:
    """What is evaluated: the same numbers on all ranks, and the groups of this one."""

    conversations: int
    interactions: int
    """Of the longest conversation."""
    groups: list[_Group]


def _plan(source: Conversations, config: RunConfig, world: World) -> _Plan:
    """The first ``evaluation.max_conversations`` conversations of the split, in groups of ``batch.lanes``
    that do not depend on the mesh."""
    special = config.model.special_tokens
    assert isinstance(special, SpecialTokens)
    assert config.batch.lanes is not None
    conversations = first_conversations(source, config.evaluation.max_conversations)
    counts = source.interaction_counts[conversations].astype(np.int64)
    order = np.argsort(-counts, kind="stable")
    # A group of one conversation has no foreign memory, so small groups join the one before.
    parts = np.array_split(order, max(1, len(order) // max(2, config.batch.lanes)))
    key = derive_key(config.seed, "evaluation", "lanes")
    groups = [
        _Group(conversations[part], counts[part], key, special.pad)
        for part in parts[world.dp_rank :: world.dp_size]
    ]
    return _Plan(len(order), int(counts.max()), groups)


def _score(
    module: SmatModule | ContextModule, hidden: torch.Tensor, at: LaneInteractions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the supervised tokens of ``at``, decoded as ``hidden``: loss, correct tokens and tokens,
    float64 [3]; then correct and all marked tokens by distance, float64 [MAX_DISTANCE + 1] each (0:
    unmarked)."""
    head = module.decoder.lm_head
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    hits, marked = torch.zeros(2, MAX_DISTANCE + 1, dtype=torch.float64, device=hidden.device)
    rows = hidden.index_select(0, at.next_index)
    columns = (rows, at.next_targets, at.target_marks)
    for start in range(0, rows.shape[0], _SCORED_ROWS):
        row, target, mark = (column[start : start + _SCORED_ROWS] for column in columns)
        logits = head(row).float()
        correct = (logits.argmax(dim=-1) == target).double()
        sums[_LOSS] += F.cross_entropy(logits, target, reduction="sum").double()
        sums[_CORRECT] += correct.sum()
        sums[_COUNT] += target.numel()
        distance = mark.long().clamp(max=MAX_DISTANCE)
        hits.index_add_(0, distance, correct)
        marked.index_add_(0, distance, torch.ones_like(correct))
    return sums, hits, marked


class _Tally:
    """Sums by interaction and memory, and those of marked tokens, added up over ranks by :meth:`report`."""

    def __init__(self, interactions: int, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._sums = torch.zeros(interactions, len(MEMORIES), 3, **options)
        self._marks = torch.zeros(len(MEMORIES), 2, MAX_DISTANCE + 1, **options)

    def add(
        self, number: int, row: int, sums: torch.Tensor, hits: torch.Tensor, marked: torch.Tensor
    ) -> None:
        """Count what :func:`_score` gave for interaction ``number`` with memory ``row``."""
        self._sums[number, row] += sums
        if number > 0:  # a first interaction has nothing to recall
            self._marks[row, 0] += hits
            self._marks[row, 1] += marked

    def report(self, *, foreign: bool) -> dict[str, Any]:
        sum_over_ranks(self._sums)
        sum_over_ranks(self._marks)
        sums, marks = self._sums.tolist(), self._marks.tolist()
        past = self._sums[1:].sum(dim=0).tolist()
        everything = _means(self._sums[:, 0].sum(dim=0).tolist())
        names = MEMORIES if foreign else MEMORIES[:2]
        memory: dict[str, Any] = dict.fromkeys(MEMORIES)
        for row, name in enumerate(names):
            memory[name] = {**_means(past[row]), **_recall(*marks[row])}
        by_interaction = []
        for number, rows in enumerate(sums, start=1):
            means = dict.fromkeys(MEMORIES) | {name: _means(rows[r]) for r, name in enumerate(names)}
            by_interaction.append({"interaction": number, **means})
        return {
            "loss": everything["answer_loss"],
            **everything,
            "memory_gain": memory["fresh"]["answer_loss"] - memory["true"]["answer_loss"],
            "memory": memory,
            "by_interaction": by_interaction,
        }


def _means(sums: list[float]) -> dict[str, float]:
    count = max(1.0, sums[_COUNT])
    return {
        "answer_loss": sums[_LOSS] / count,
        "answer_accuracy": sums[_CORRECT] / count,
        "tokens": sums[_COUNT],
    }


def _recall(hits: list[float], marked: list[float]) -> dict[str, Any]:
    pairs = {str(d): [hits[d], marked[d]] for d in range(1, MAX_DISTANCE + 1) if marked[d]}
    total = sum(count for _, count in pairs.values())
    recall = sum(correct for correct, _ in pairs.values()) / total if total else None
    return {"recall": recall, "recall_by_distance": pairs}
