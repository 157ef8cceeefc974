"""Does the memory work? Held-out conversations answered with the true, a fresh and a foreign memory.

*True*: the STM the model wrote from the conversation so far. *Fresh*: an initial STM, as if nothing had
been said. *Foreign*: the STM of another conversation at the same point. If the answers do not need the
memory, or the model does not use it, the three give the same loss.

Shape legend: b conversations of a group, t supervised tokens of one interaction of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rxt_dist.config import RunConfig, SpecialTokens
from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch, read_interactions
from rxt_dist.data.order import Int64Array
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.parallel.bootstrap import World
from rxt_dist.parallel.collectives import sum_over_ranks
from rxt_dist.randomness import derive_key
from rxt_dist.stages.base import CROSS_ENTROPY_CHUNK
from rxt_dist.stages.lane_stage import LaneStageModule
from rxt_dist.stages.smat import SmatModule

MEMORIES = ("true", "fresh", "foreign")
MAX_DISTANCE = 8
"""Recall is reported by distance up to this; farther ones are counted with it."""

_LOSS, _CORRECT, _COUNT = range(3)
_RECALL = 3  # then, for distances 1..MAX_DISTANCE, correct and count
_COLUMNS = _RECALL + 2 * MAX_DISTANCE


def evaluate_memory(
    module: SmatModule, source: InteractionPieces, config: RunConfig, world: World
) -> dict[str, Any]:
    """Answer loss and accuracy per supervised token with each memory, and recall of marked tokens.

    ``answer_loss`` and ``answer_accuracy`` are over all interactions with the true memory; ``memory``
    holds, for every memory, the same over the interactions that have a past, plus ``recall`` (accuracy
    on marked tokens; None without marks) and ``recall_by_distance`` {distance: [correct, count]}.
    ``memory_gain`` is the loss with a fresh memory less the loss with the true one. Collective.
    """
    sums = torch.zeros(len(MEMORIES), _COLUMNS, dtype=torch.float64, device=world.device)
    first = torch.zeros(_RECALL, dtype=torch.float64, device=world.device)
    for group in _groups(source, config, world):
        stm: torch.Tensor | None = None
        for at in group.interactions(source, world.device):
            fresh = module.fresh.draw(at.visits)
            stm = fresh if stm is None else stm
            begun = bool(at.numbers[0] > 0)
            for row, memory in enumerate((stm, fresh, stm.roll(1, dims=1))):
                scores = _score(module, memory, at)
                if begun:
                    sums[row] += scores
                elif row == 0:
                    first += scores[:_RECALL]
            stm = module.write(stm, at)
    sum_over_ranks(sums)
    sum_over_ranks(first)
    return _report(sums.tolist(), first.tolist())


def evaluate_updates(
    module: LaneStageModule, source: InteractionPieces, config: RunConfig, world: World
) -> dict[str, Any]:
    """Loss of the memory update per slot that has a token, without noise: means over held-out
    conversations of the terms of stage ``memory_attention``. Collective."""
    names = module.metric_names
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device)
    for group in _groups(source, config, world):
        stm: torch.Tensor | None = None
        for at in group.interactions(source, world.device):
            stm = module.fresh.draw(at.visits).clone() if stm is None else stm
            batch = WindowBatch(at.visits, 0, None, (at,))
            terms, stm = module.run(batch, stm)
            counts = module.local_counts(batch)
            for row, name in enumerate(names):
                sums[row, 0] += terms[name].total.double()
                sums[row, 1] += counts[terms[name].count]
    sum_over_ranks(sums)
    means = {name: total / max(1.0, count) for name, (total, count) in zip(names, sums.tolist(), strict=True)}
    loss = sum(module.weights[name] * mean for name, mean in means.items())
    return {"loss": loss, **means}


@dataclass(frozen=True)
class _Group:
    """Conversations that are evaluated side by side, longest first so that those that end come last."""

    conversations: Int64Array
    key: int
    pad_id: int

    def interactions(self, source: InteractionPieces, device: torch.device) -> Iterator[LaneInteractions]:
        """First, second, ... interactions; a conversation that has ended is absent."""
        dataset = source.dataset
        counts = dataset.interactions[self.conversations].astype(np.int64)
        starts = dataset.interaction_starts[self.conversations]
        for number in range(int(counts.max())):
            yield read_interactions(
                source,
                starts + number,
                visits=self.conversations,
                numbers=np.full(len(counts), number, dtype=np.int64),
                present=counts > number,
                token_key=self.key,
                pad_id=self.pad_id,
                supervise=True,
            ).to(device)


def _groups(source: InteractionPieces, config: RunConfig, world: World) -> Iterator[_Group]:
    """This rank's groups of validation conversations, of at most ``batch.lanes``; the grouping is the
    same on every mesh. ``evaluation.max_packs`` limits the number of groups of all ranks."""
    special = config.model.special_tokens
    assert isinstance(special, SpecialTokens)
    assert config.batch.lanes is not None
    counts = source.dataset.interactions.astype(np.int64)
    order = np.argsort(-counts, kind="stable")
    # A group of one conversation has no foreign memory, so small groups join the one before.
    groups = max(1, len(order) // config.batch.lanes)
    parts = np.array_split(order, groups)[: config.evaluation.max_packs]
    key = derive_key(config.seed, "evaluation", "lanes")
    for part in parts[world.rank :: world.size]:
        yield _Group(part, key, special.pad)


def _score(module: SmatModule, stm: torch.Tensor, at: LaneInteractions) -> torch.Tensor:
    """Sums over the supervised tokens of ``at`` read with ``stm``: float64 [_COLUMNS]."""
    hidden, _ = module.decode(stm, at)
    head = module.decoder.lm_head
    result = torch.zeros(_COLUMNS, dtype=torch.float64, device=stm.device)
    rows = hidden.index_select(0, at.next_index)
    columns = (rows, at.next_targets, at.target_marks)
    for start in range(0, rows.shape[0], CROSS_ENTROPY_CHUNK):
        row, target, mark = (column[start : start + CROSS_ENTROPY_CHUNK] for column in columns)
        logits = F.linear(row, head.weight, head.bias).float()
        correct = (logits.argmax(dim=-1) == target).double()
        result[_LOSS] += F.cross_entropy(logits, target, reduction="sum").double()
        result[_CORRECT] += correct.sum()
        result[_COUNT] += target.numel()
        for distance in range(1, MAX_DISTANCE + 1):
            marked = (mark == distance) if distance < MAX_DISTANCE else (mark >= distance)
            column = _RECALL + 2 * (distance - 1)
            result[column] += (correct * marked).sum()
            result[column + 1] += marked.sum()
    return result


def _report(sums: list[list[float]], first: list[float]) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    for name, row in zip(MEMORIES, sums, strict=True):
        marked = {d: row[_RECALL + 2 * (d - 1) : _RECALL + 2 * d] for d in range(1, MAX_DISTANCE + 1)}
        total = sum(count for _, count in marked.values())
        memory[name] = {
            "answer_loss": row[_LOSS] / max(1.0, row[_COUNT]),
            "answer_accuracy": row[_CORRECT] / max(1.0, row[_COUNT]),
            "tokens": row[_COUNT],
            "recall": sum(correct for correct, _ in marked.values()) / total if total else None,
            "recall_by_distance": {str(d): pair for d, pair in marked.items() if pair[1]},
        }
    everything = [sums[0][column] + first[column] for column in range(_RECALL)]
    loss = everything[_LOSS] / max(1.0, everything[_COUNT])
    return {
        "loss": loss,
        "answer_loss": loss,
        "answer_accuracy": everything[_CORRECT] / max(1.0, everything[_COUNT]),
        "tokens": everything[_COUNT],
        "memory_gain": memory["fresh"]["answer_loss"] - memory["true"]["answer_loss"],
        "memory": memory,
    }
