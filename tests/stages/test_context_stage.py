"""Stage context_sft against a plain loop: one conversation, one interaction, one encoding at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.lanes import (
    Interaction,
    Lanes,
    MemoryPieces,
    gradients,
    lane_config,
    lane_model,
    lane_module,
    plain_context_answer,
    plain_encoding,
    random_conversations,
    size_of,
    timeline,
    windows,
)

from rxt_dist.config import RunConfig, load_config
from rxt_dist.errors import ConfigError
from rxt_dist.parallel.bootstrap import World
from rxt_dist.train.memory_evaluation import evaluate_context

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
LANES = 4


def context_config(**settings: Any) -> RunConfig:
    return lane_config("{name: context_sft, steps: 4, system_prompts: true}", **settings)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_loss_and_gradients_are_those_of_a_plain_loop(window: int) -> None:
    """Lanes whose conversations begin inside a window, with and without a system prompt."""
    config = context_config()
    model = lane_model(config)
    module = lane_module(config, model)
    conversations = random_conversations(COUNTS)
    prompts = [[2, 9, 11, 30], [], [2, 8], [], [2, 17, 12], [], [], [2, 40]]
    source, lanes = MemoryPieces(conversations, prompts), Lanes(module, config)
    places = timeline(source, LANES, 4 * window)
    begun_inside = 0
    with windows(source, window=window, system_prompts=True) as steps:
        for number in range(4):
            step = next(steps)
            loss, metrics = lanes.step(step)
            found = gradients(module, loss)
            answers = []
            for lane in range(LANES):
                read: list[torch.Tensor] = []
                for position in range(window):
                    place = places[number * window + position][lane]
                    conversation = conversations[place.conversation]
                    if place.number == 0:
                        begun_inside += position > 0
                        prompt = prompts[place.conversation]
                        read = [plain_encoding(model, prompt)] if prompt else []
                    else:
                        read.append(plain_encoding(model, conversation[place.number - 1].tokens))
                    answers.append(plain_context_answer(model, read, conversation[place.number]))
            targets, tokens = sum(a.targets for a in answers), sum(a.tokens for a in answers)
            answer_loss = torch.stack([a.loss for a in answers]).sum() / targets
            plain = answer_loss + 0.01 * torch.stack([a.balance for a in answers]).sum() / tokens
            torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(metrics[1], answer_loss.detach(), rtol=1e-5, atol=1e-6)
            assert metrics[2].item() == pytest.approx(sum(a.correct for a in answers) / targets)
            expected = gradients(module, plain)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
            assert size_of(found, "decoder") > 1e-4
            if window == 8:
                assert size_of(found, "encoder.layers") > 1e-5
    assert begun_inside or window == 1


def test_a_lane_without_an_interaction_adds_nothing_that_is_read() -> None:
    """A damaged block: not even NaN of its encoding reaches a loss or a gradient."""
    config = context_config()
    module = lane_module(config)
    with windows(MemoryPieces(random_conversations([6] * 4)), window=3) as steps:
        step = next(steps)
    (batch,) = step.batches
    gone = torch.tensor([True, False, True, True])
    looked = tuple(replace(at, present=at.present & gone) for at in batch.look_backs)
    empty, _, _ = module(replace(batch, look_backs=looked), step.counts)
    other = []
    for at in batch.look_backs:
        mine = at.layout.sequence_ids == 1
        other.append(replace(at, tokens=at.tokens.masked_fill(mine, 12), present=at.present & gone))
    same, _, _ = module(replace(batch, look_backs=tuple(other)), step.counts)
    full, _, _ = module(batch, step.counts)
    assert empty.item() == same.item() != full.item()


def test_parameters_are_those_of_encoder_and_decoder_and_the_carried_memory_is_left_alone() -> None:
    config = context_config()
    module = lane_module(config)
    assert {name for name, _ in module.named_children()} == {"encoder", "decoder"}
    stm = torch.randn(2, LANES, 6, config.model.embed_dim)
    with windows(MemoryPieces(random_conversations(COUNTS)), window=2) as steps:
        step = next(steps)
        _, _, carried = module(step.batches[0], step.counts, stm)
    assert carried is stm


def test_evaluation_reads_whole_conversations_with_their_own_no_and_foreign_encodings() -> None:
    config = context_config(batch__lanes=8)
    model = lane_model(config)
    module = lane_module(config, model).eval()
    conversations = [
        [Interaction(one.tokens, one.answer, [0] * 4 + [1] * (len(one.tokens) - 4)) for one in conversation]
        for conversation in random_conversations(COUNTS, seed=4)
    ]
    source = MemoryPieces(conversations)
    world = World(0, 0, 1, torch.device("cpu"))
    with torch.no_grad():
        result = evaluate_context(module, source, config, config.stages[0], world)  # type: ignore[arg-type]
        order = sorted(range(len(COUNTS)), key=lambda c: -COUNTS[c])
        losses = {"true": [0.0, 0], "fresh": [0.0, 0], "foreign": [0.0, 0]}
        for rank, number in enumerate(order):
            conversation, neighbour = conversations[number], conversations[order[rank - 1]]
            for t, interaction in enumerate(conversation):
                if t == 0:
                    continue
                read = {
                    "true": [plain_encoding(model, one.tokens) for one in conversation[:t]],
                    "fresh": [],
                    "foreign": [plain_encoding(model, one.tokens) for one in neighbour[:t]],
                }
                for name, encodings in read.items():
                    answer = plain_context_answer(model, encodings, interaction)
                    losses[name][0] += answer.loss.item()
                    losses[name][1] += answer.targets
    for name, (total, count) in losses.items():
        assert result["memory"][name]["answer_loss"] == pytest.approx(total / count, rel=1e-5), name
        assert result["memory"][name]["tokens"] == count
        assert 0 <= result["memory"][name]["recall"] <= 1
    assert len({round(value["answer_loss"], 6) for value in result["memory"].values()}) == 3


def test_what_the_stage_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.decoder\.causal_cross: found true; .* valid: false"):
        context_config(model__decoder__causal_cross=True)
    with pytest.raises(ConfigError, match=r"\.frozen: .* no effect in stage context_sft, only in smat"):
        lane_config("{name: context_sft, steps: 4, frozen: [encoder]}")
    with pytest.raises(ConfigError, match=r"\.window: .* no effect in stage joint_lm, only in context"):
        load_config("tiny", ["stages=[{name: joint_lm, steps: 2, window: 3}]"], require_data=False)
