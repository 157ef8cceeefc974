"""Held-out evaluation of the memory, against a plain loop over conversations."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lanes import (
    SLOTS,
    Answer,
    Conversation,
    Interaction,
    MemoryPieces,
    fresh_stm,
    lane_config,
    lane_model,
    lane_module,
    plain_answer,
    plain_write,
    random_conversations,
)

from rxt_dist.config import RunConfig
from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.parallel.bootstrap import World
from rxt_dist.train import memory_evaluation
from rxt_dist.train.memory_evaluation import evaluate_memory, evaluate_updates

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
FARTHEST = 32  # distances beyond are counted with it


def marked_conversations() -> list[Conversation]:
    """Conversations whose answers repeat a word, some of it marked: distances 1 to 3, 32, 33 and 255."""
    rng = np.random.default_rng(8)
    distances = [1, 2, 3, 32, 33, 255]
    conversations = []
    for number, conversation in enumerate(random_conversations(COUNTS, seed=2)):
        marked = []
        for t, one in enumerate(conversation):
            query = one.tokens[2 : len(one.tokens) - one.answer]
            answer = rng.integers(7, 41, 3).tolist()
            marks = {t % 3: distances[(2 * number + t) % 6]} if number % 3 else {}
            marked.append(Interaction.of(query, answer, marks))
        conversations.append(marked)
    return conversations


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, 0, size, torch.device("cpu"))


def grouped(conversations: list[Conversation], lanes: int) -> list[list[int]]:
    """Conversations that are evaluated side by side: longest first, at least ``lanes`` and two together."""
    order = sorted(range(len(conversations)), key=lambda c: -len(conversations[c]))
    groups = max(1, len(order) // max(2, lanes))
    return [part.tolist() for part in np.array_split(np.array(order), groups)]


class Tally:
    """Sums over answers."""

    def __init__(self) -> None:
        self.loss, self.correct, self.targets = 0.0, 0, 0
        self.recall: dict[str, list[int]] = {}

    def add(self, answer: Answer) -> None:
        self.loss += answer.loss.item()
        self.correct += answer.correct
        self.targets += answer.targets
        for mark, hit in answer.hits:
            if mark:
                pair = self.recall.setdefault(str(min(mark, FARTHEST)), [0, 0])
                pair[0] += hit
                pair[1] += 1


def plain_evaluation(
    config: RunConfig,
    model: RxTModel,
    conversations: list[Conversation],
    prompts: list[list[int]] | None = None,
) -> dict[Any, Tally]:
    """Tallies by memory over interactions that have a past, "all" over every one with the true memory, and
    by memory and number of the interaction."""
    tallies: dict[Any, Tally] = defaultdict(Tally)
    assert config.batch.lanes is not None
    for group in grouped(conversations, config.batch.lanes):
        fresh = [fresh_stm(config, c) for c in group]
        stms = [
            plain_write(model, one, Interaction(prompts[c], 0, [])) if prompts and prompts[c] else one
            for one, c in zip(fresh, group, strict=True)
        ]
        for t in range(max(len(conversations[c]) for c in group)):
            before = list(stms)
            for lane, c in enumerate(group):
                if t >= len(conversations[c]):
                    continue
                one = conversations[c][t]
                true = plain_answer(model, before[lane], one)
                tallies["all"].add(true)
                answers = {
                    "true": true,
                    "fresh": plain_answer(model, fresh[lane], one),
                    "foreign": plain_answer(model, before[lane - 1], one),
                }
                for name, answer in answers.items():
                    tallies[name, t].add(answer)
                    if t > 0:
                        tallies[name].add(answer)
                stms[lane] = plain_write(model, before[lane], one)
    return tallies


def assert_report(record: dict[str, Any], tallies: dict[Any, Tally]) -> None:
    longest = max(key[1] for key in tallies if isinstance(key, tuple))
    assert [row["interaction"] for row in record["by_interaction"]] == list(range(1, longest + 2))
    for t, row in enumerate(record["by_interaction"]):
        for name in ("true", "fresh", "foreign"):
            expected = tallies[name, t]
            assert row[name]["tokens"] == expected.targets
            assert row[name]["answer_loss"] == pytest.approx(expected.loss / expected.targets, rel=1e-5)
            assert row[name]["answer_accuracy"] == pytest.approx(expected.correct / expected.targets)
    for name in ("true", "fresh", "foreign"):
        found, expected = record["memory"][name], tallies[name]
        assert found["tokens"] == expected.targets
        assert found["answer_loss"] == pytest.approx(expected.loss / expected.targets, rel=1e-5)
        assert found["answer_accuracy"] == pytest.approx(expected.correct / expected.targets, rel=1e-9)
        assert found["recall_by_distance"] == expected.recall
        total = sum(count for _, count in expected.recall.values())
        recall = sum(correct for correct, _ in expected.recall.values()) / total if total else None
        assert found["recall"] == (None if recall is None else pytest.approx(recall))
    everything = tallies["all"]
    assert record["tokens"] == everything.targets
    assert record["answer_loss"] == pytest.approx(everything.loss / everything.targets, rel=1e-5)
    assert record["loss"] == record["answer_loss"]
    assert record["answer_accuracy"] == pytest.approx(everything.correct / everything.targets, rel=1e-9)
    losses = {name: tallies[name].loss / tallies[name].targets for name in ("true", "fresh")}
    assert record["memory_gain"] == pytest.approx(losses["fresh"] - losses["true"], abs=1e-5)


def taught(config: RunConfig, conversations: list[Conversation]) -> RxTModel:
    """A model that is right often enough for recall to be neither 0 nor 1."""
    model = lane_model(config)
    marked = [
        w for c in conversations for one in c for w, mark in zip(one.tokens, one.marks, strict=True) if mark
    ]
    with torch.no_grad():
        model.decoder.lm_head.bias[sorted(set(marked))[::2]] += 2.0
    return model


@pytest.mark.parametrize("lanes", [1, 3, 4, 20])
@torch.no_grad()
def test_the_report_is_that_of_a_plain_loop(lanes: int) -> None:
    config, conversations = lane_config(batch__lanes=lanes), marked_conversations()
    model = taught(config, conversations)
    tallies = plain_evaluation(config, model, conversations)
    assert set(tallies["true"].recall) == {"1", "2", "3", "32"}
    assert sum(correct for correct, _ in tallies["true"].recall.values()) > 0
    losses = [tallies[name].loss / tallies[name].targets for name in ("true", "fresh", "foreign", "all")]
    assert len({round(loss, 5) for loss in losses}) == 4, "the memories must differ"
    module = lane_module(config, model).eval()
    record = evaluate_memory(module, MemoryPieces(conversations), config, world())  # type: ignore[arg-type]
    assert_report(record, tallies)


@torch.no_grad()
def test_every_group_is_evaluated_by_exactly_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    config, source = lane_config(batch__lanes=2), MemoryPieces(marked_conversations())
    module = lane_module(config).eval()
    expected = evaluate_memory(module, source, config, world())  # type: ignore[arg-type]
    for size in (2, 3, 7):
        parts: list[list[torch.Tensor]] = []
        for rank in range(size):
            own: list[torch.Tensor] = []
            monkeypatch.setattr(memory_evaluation, "sum_over_ranks", lambda v, own=own: own.append(v.clone()))
            evaluate_memory(module, source, config, world(rank, size))  # type: ignore[arg-type]
            parts.append(own)
        totals = [torch.stack(values).sum(0) for values in zip(*parts, strict=True)]

        def summed(values: torch.Tensor, totals: list[torch.Tensor] = totals) -> None:
            values.copy_(totals.pop(0))

        monkeypatch.setattr(memory_evaluation, "sum_over_ranks", summed)
        found = evaluate_memory(module, source, config, world(0, size))  # type: ignore[arg-type]
        for name, memory in expected["memory"].items():
            assert found["memory"][name]["recall_by_distance"] == memory["recall_by_distance"]
            for key in ("answer_loss", "answer_accuracy", "tokens", "recall"):
                assert found["memory"][name][key] == pytest.approx(memory[key], rel=1e-9)
        monkeypatch.undo()


@torch.no_grad()
def test_the_number_of_conversations_can_be_limited() -> None:
    """The first of the split, not the longest."""
    conversations = marked_conversations()
    config = lane_config(batch__lanes=2, evaluation__max_conversations=5)
    model = taught(config, conversations)
    tallies = plain_evaluation(config, model, conversations[:5])
    module = lane_module(config, model).eval()
    record = evaluate_memory(module, MemoryPieces(conversations), config, world())  # type: ignore[arg-type]
    assert_report(record, tallies)
    assert record["tokens"] == sum(one.answer for c in conversations[:5] for one in c)


@torch.no_grad()
def test_conversations_chosen_of_several_datasets_are_those_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All start from the same memory, so that nothing else depends on their numbers."""
    conversations, chosen = marked_conversations(), [1, 2, 4, 6, 7]
    config = lane_config(batch__lanes=2, model__stm_init="{distribution: standard, shared: true}")
    module = lane_module(config, taught(config, conversations)).eval()
    few = MemoryPieces([conversations[number] for number in chosen])
    expected = evaluate_memory(module, few, config, world())  # type: ignore[arg-type]
    monkeypatch.setattr(memory_evaluation, "first_conversations", lambda source, limit: np.array(chosen))
    found = evaluate_memory(module, MemoryPieces(conversations), config, world())  # type: ignore[arg-type]
    assert found == expected


@torch.no_grad()
def test_a_single_conversation_has_no_foreign_memory() -> None:
    conversations = marked_conversations()[2:3]
    config = lane_config(batch__lanes=4)
    module = lane_module(config).eval()
    record = evaluate_memory(module, MemoryPieces(conversations), config, world())  # type: ignore[arg-type]
    assert record["memory"]["foreign"] is None
    assert all(row["foreign"] is None for row in record["by_interaction"])
    assert record["memory"]["true"]["tokens"] == record["memory"]["fresh"]["tokens"] > 0
    assert record["statistics"]["memory_between_share"] == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
def test_system_prompts_are_written_into_the_true_memory_alone() -> None:
    conversations = marked_conversations()
    prompts = [[2, 9, 10 + number] if number % 2 else [] for number in range(len(conversations))]
    config = lane_config("{name: smat, steps: 4, system_prompts: true}", batch__lanes=3)
    model = taught(config, conversations)
    tallies = plain_evaluation(config, model, conversations, prompts)
    module = lane_module(config, model).eval()
    record = evaluate_memory(module, MemoryPieces(conversations, prompts), config, world())  # type: ignore[arg-type]
    assert_report(record, tallies)
    first = record["by_interaction"][0]
    assert abs(first["true"]["answer_loss"] - first["fresh"]["answer_loss"]) > 1e-6


@torch.no_grad()
def test_the_statistics_are_of_what_every_conversation_left() -> None:
    config, conversations = lane_config(batch__lanes=3), random_conversations(COUNTS)
    model = lane_model(config)
    left = []
    for number, conversation in enumerate(conversations):
        stm = fresh_stm(config, number)
        for one in conversation:
            stm = plain_write(model, stm, one)
        left.append(stm[:, 0].double())
    stacked = torch.stack(left)
    share = stacked.var(dim=0, correction=0).sum() / stacked.square().mean(dim=0).sum()
    module = lane_module(config, model).eval()
    found = evaluate_memory(module, MemoryPieces(conversations), config, world())["statistics"]  # type: ignore[arg-type]
    assert found["memory_rms"] == pytest.approx(stacked.square().mean().sqrt().item(), rel=1e-5)
    assert found["memory_between_share"] == pytest.approx(share.item(), rel=1e-5)
    assert 0 < found["write_gate_mean"] < 1
    assert module.memory_sums is None


@torch.no_grad()
def test_a_dataset_without_marks_has_no_recall() -> None:
    config, source = lane_config(), MemoryPieces(random_conversations(COUNTS))
    record = evaluate_memory(lane_module(config).eval(), source, config, world())  # type: ignore[arg-type]
    for memory in record["memory"].values():
        assert memory["recall"] is None
        assert memory["recall_by_distance"] == {}
        assert memory["tokens"] > 0


@torch.no_grad()
def test_conversations_of_one_interaction_have_no_past() -> None:
    config, source = lane_config(), MemoryPieces(random_conversations([1] * 5))
    record = evaluate_memory(lane_module(config).eval(), source, config, world())  # type: ignore[arg-type]
    assert record["tokens"] == source.answer_kept.sum()
    assert record["answer_loss"] > 0
    assert record["memory_gain"] == 0.0
    assert all(memory["tokens"] == 0 for memory in record["memory"].values())


@pytest.mark.parametrize("lanes", [2, 20])
@torch.no_grad()
def test_updates_are_evaluated_over_the_slots_that_have_a_token(lanes: int) -> None:
    """Conversations that have ended count for nothing, and neither noise nor jitter is drawn."""
    stage = "{name: memory_attention, steps: 4, noise_level: 0.5, label_weight_jitter: 0.15"
    config = lane_config(f"{stage}, stm_difference_scale: 0.2}}", batch__lanes=lanes)
    conversations = random_conversations(COUNTS)
    model = lane_model(config)
    cosines, differences = [], []
    for number, conversation in enumerate(conversations):
        stm = fresh_stm(config, number)
        for t, one in enumerate(conversation):
            layout = SequenceLayout.from_lengths([len(one.tokens)])
            encoded = model.encoder(torch.tensor(one.tokens), layout)
            after = plain_write(model, stm, one)
            slots = min(SLOTS, len(one.tokens))
            new = 0.9 if t == 0 else 0.5 - 0.05 * t
            label = (1 - new) * stm[:, 0, :slots] + new * encoded[:, :slots]
            cosines.append(torch.cosine_similarity(after[:, 0, :slots], label, dim=-1).mean(0))
            differences.append(math.sqrt(t + 1) * (after - stm).square().mean())
            stm = after
    module = lane_module(config, model).eval()
    record = evaluate_updates(module, MemoryPieces(conversations), config, world())  # type: ignore[arg-type]
    loss, difference = -torch.cat(cosines).mean().item(), torch.stack(differences).mean().item()
    assert record["memory_loss"] == pytest.approx(loss, rel=1e-5)
    assert record["stm_difference"] == pytest.approx(difference, rel=1e-5)
    assert record["loss"] == pytest.approx(loss + 0.2 * difference, rel=1e-5)
