"""SMAT: what reaches encoder and memory attention, and how far back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.lanes import (
    Interaction,
    Lanes,
    MemoryPieces,
    Recorder,
    fresh_stm,
    gradients,
    lane_config,
    lane_model,
    lane_module,
    plain_answer,
    plain_memories,
    plain_write,
    random_conversations,
    size_of,
    timeline,
    windows,
)

from rxt_dist.data.lane_loader import LaneInteractions, WindowBatch, WindowStep
from rxt_dist.model import DecoderOutput

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
LANES = 4
TOLERANCE = 1e-5


def test_the_loss_reaches_every_component_whenever_a_conversation_has_a_past() -> None:
    config = lane_config()
    for window in (1, 3):
        module = lane_module(config)
        source, lanes = MemoryPieces(random_conversations(COUNTS)), Lanes(module, config)
        past, none = 0, 0
        with windows(source, window=window) as steps:
            for _ in range(8 // window + 2):
                step = next(steps)
                found = gradients(module, lanes.step(step)[0])
                assert size_of(found, "decoder") > 1e-4
                written = [size_of(found, part) for part in ("encoder.layers", "memory_attention")]
                if any(bool((at.numbers > 0).any()) for at in step.batches[0].positions):
                    past += 1
                    assert min(written) > 1e-6, (window, written)
                else:
                    none += 1
                    assert max(written) == 0.0, (window, written)
        assert past >= 3
        assert window == 3 or none >= 1


def absent(at: LaneInteractions) -> LaneInteractions:
    return replace(at, present=torch.zeros_like(at.present))


def test_carrying_the_result_of_the_last_write_would_train_neither_encoder_nor_memory_attention() -> None:
    """Why a lane carries the STM from before its last write: this is what the first test must notice."""
    config = lane_config()
    module = lane_module(config)
    source, lanes = MemoryPieces(random_conversations([6] * 4)), Lanes(module, config)
    with windows(source, window=1) as steps:
        lanes.step(next(steps))
        for _ in range(3):
            step = next(steps)
            (batch,) = step.batches
            (before,) = batch.look_backs
            written = module.write(lanes.stm, module.encode(before), before)[0].detach()
            naive, _, _ = module(replace(batch, look_backs=(absent(before),)), step.counts, written)
            naive_gradients = gradients(module, naive)
            for part in ("encoder.layers", "memory_attention"):
                assert size_of(naive_gradients, part) == 0.0
            loss, _ = lanes.step(step)
            torch.testing.assert_close(loss, naive, rtol=1e-6, atol=0)
            assert size_of(gradients(module, loss), "memory_attention") > 1e-6


@pytest.mark.parametrize("window", [1, 2, 3])
def test_gradients_go_through_as_many_writes_as_the_window_has_positions(window: int) -> None:
    """A perturbation of every write: the loss at the last position of a window depends on the last W writes
    and, as far as gradients go, on none before."""
    config = lane_config(batch__lanes=1)
    module = lane_module(config)
    source, lanes = MemoryPieces(random_conversations([9])), Lanes(module, config, lanes=1)
    shifts: dict[int, torch.Tensor] = {}
    write, decode = module.write, module.decode
    losses: dict[int, torch.Tensor] = {}

    def shifted(
        stm: torch.Tensor, layers: torch.Tensor, at: LaneInteractions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        written, gates = write(stm, layers, at)
        if not bool(at.present[0]):
            return written, gates
        number = int(at.numbers[0])
        assert number not in shifts, "an interaction was written twice"
        shifts[number] = torch.zeros_like(written, requires_grad=True)
        return written + shifts[number], gates

    def probed(stm: torch.Tensor, at: LaneInteractions) -> DecoderOutput:
        output = decode(stm, at)
        for position, number in enumerate(at.numbers.tolist()):
            mine = at.layout.sequence_ids == position
            losses[number] = output.hidden[mine].square().sum()
        return output

    module.write, module.decode = shifted, probed
    with windows(source, window=window, lanes=1) as steps:
        for number in range(9 // window):
            lanes.step(next(steps))
            last = window * (number + 1) - 1
            writes = {back: shifts[last - back] for back in range(1, last + 1)}
            if not writes:
                continue
            found = torch.autograd.grad(
                losses[last], list(writes.values()), retain_graph=True, allow_unused=True
            )
            for back, gradient in zip(writes, found, strict=True):
                if back <= window:
                    assert gradient is not None, (last, back)
                    assert gradient.abs().max() > 1e-6, (last, back)
                else:
                    assert gradient is None, (last, back)
    assert last >= 2 * window


def test_the_memory_itself_goes_back_to_the_beginning() -> None:
    """Values are not truncated: the first interaction changes the last answer through every window."""
    config = lane_config(batch__lanes=1)
    original = random_conversations([6])
    changed = [[Interaction.of([7, 8, 9, 10], [11]), *original[0][1:]]]
    found = []
    for conversations in (original, changed):
        module = lane_module(config)
        recorder, lanes = Recorder(module), Lanes(module, config, lanes=1)
        with windows(MemoryPieces(conversations), window=2, lanes=1) as steps:
            for _ in range(3):
                lanes.step(next(steps))
        found.append(recorder.memories)
    assert torch.equal(found[0][0], found[1][0])
    for before, after in zip(found[0][1:], found[1][1:], strict=True):
        assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_window_hands_on_the_memory_before_its_last_write(window: int) -> None:
    config = lane_config()
    module = lane_module(config)
    recorder, lanes = Recorder(module), Lanes(module, config)
    with windows(MemoryPieces(random_conversations(COUNTS)), window=window) as steps:
        for _ in range(4):
            lanes.step(next(steps))
            assert torch.equal(lanes.stm, recorder.memories[-1])
            assert not lanes.stm.requires_grad


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_every_interaction_is_answered_with_the_memory_of_a_plain_loop(window: int, micro: int) -> None:
    """Over all windows, refills, and resets at any position of a window."""
    config = lane_config()
    module = lane_module(config)
    source, lanes = MemoryPieces(random_conversations(COUNTS)), Lanes(module, config)
    recorder = Recorder(module)
    positions = 24
    with windows(source, window=window, micro=micro) as steps, torch.no_grad():
        for _ in range(positions // window):
            lanes.step(next(steps))
    expected = timeline(source, LANES, positions)
    model, known = lane_model(config), {}
    resets = set()
    for index, (memory, at) in enumerate(zip(recorder.memories, recorder.positions, strict=True)):
        batches = LANES // micro  # of a step, each with all positions of its window
        step, rest = divmod(index, batches * window)
        first, position = rest // window * micro, step * window + rest % window
        for column in range(micro):
            place = expected[position][first + column]
            assert (int(at.visits[column]), int(at.numbers[column])) == (place.visit, place.number)
            if place.visit not in known:
                with torch.no_grad():
                    known[place.visit] = plain_memories(
                        model, fresh_stm(config, place.visit), source.conversations[place.conversation]
                    )
            error = (memory[:, column] - known[place.visit][place.number][:, 0]).abs().max()
            assert error <= 1e-6, (position, first + column, place)
            if place.number == 0:
                resets.add(position % window)
    assert resets == set(range(window)), "a reset at every place of the window is needed"
    assert len(known) > len(COUNTS), "conversations must be visited again"


def plain_window(config: Any, model: Any, source: MemoryPieces, window: int) -> tuple[Any, ...]:
    """Loss and balance sums of the first window as one graph a conversation, and its counts."""
    places = timeline(source, LANES, window)
    losses, balances, targets, tokens, correct = [], [], 0, 0, 0
    for lane in range(LANES):
        stm = None
        for t in range(window):
            place = places[t][lane]
            conversation = source.conversations[place.conversation]
            if place.number == 0:
                stm = fresh_stm(config, place.visit)
            else:
                stm = plain_write(model, stm, conversation[place.number - 1])
            answer = plain_answer(model, stm, conversation[place.number])
            losses.append(answer.loss)
            balances.append(answer.balance)
            targets, tokens = targets + answer.targets, tokens + answer.tokens
            correct += answer.correct
    return torch.stack(losses).sum() / targets, torch.stack(balances).sum() / tokens, correct / targets


@pytest.mark.parametrize("counts", [[5] * 4, COUNTS], ids=["one conversation", "several and a part"])
def test_a_window_over_whole_conversations_is_plain_autograd(counts: list[int]) -> None:
    window = 5 if counts == [5] * 4 else 8
    config = lane_config()
    source = MemoryPieces(random_conversations(counts))
    module = lane_module(config)
    with windows(source, window=window) as steps:
        loss, metrics = Lanes(module, config).step(next(steps))
    found = gradients(module, loss)

    reference = lane_module(config)
    answer_loss, balance, accuracy = plain_window(config, reference, source, window)
    expected = answer_loss + 0.01 * balance
    wanted = gradients(reference, expected)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=0)
    values = dict(zip(("loss", *module.metric_names), metrics.tolist(), strict=True))
    assert values["answer_loss"] == pytest.approx(answer_loss.item(), rel=TOLERANCE)
    assert values["answer_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert values["aux_loss"] == pytest.approx(balance.item(), rel=TOLERANCE)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in found.items():
        scale = max(wanted[name].abs().max(), 1e-4 * largest)
        assert (gradient - wanted[name]).abs().max() <= TOLERANCE * scale, name


@pytest.mark.parametrize("frozen", ["", "encoder", "memory_attention", "decoder", "encoder, decoder"])
@pytest.mark.parametrize("window", [1, 3])
def test_every_trainable_parameter_gets_a_finite_gradient_in_every_step(window: int, frozen: str) -> None:
    """Also in the first step, where no lane has a past; conversations of one interaction never have one."""
    config = lane_config(f"{{name: smat, steps: 4, frozen: [{frozen}]}}")
    for counts in (COUNTS, [1] * 6):
        module = lane_module(config)
        lanes = Lanes(module, config)
        with windows(MemoryPieces(random_conversations(counts)), window=window) as steps:
            for _ in range(3):
                found = gradients(module, lanes.step(next(steps))[0])
                for name, gradient in found.items():
                    assert torch.isfinite(gradient).all(), name
        # The embedding is listed under the encoder, which shares it with the decoder.
        embedding = found.pop("encoder.embedding.weight", None)
        trained = {name.partition(".")[0] for name in found}
        left = {"encoder", "memory_attention", "decoder"} - set(frozen.split(", "))
        assert trained == left
        assert (embedding is not None) == bool(left & {"encoder", "decoder"})


def test_a_memory_that_was_never_written_is_not_read() -> None:
    """What a lane carried before its first conversation, NaN included, reaches nothing."""
    config = lane_config()
    module = lane_module(config)
    source = MemoryPieces(random_conversations(COUNTS))
    results = []
    for value in (0.0, float("nan")):
        lanes = Lanes(module, config)
        lanes.stm.fill_(value)
        with windows(source, window=2) as steps:
            step: WindowStep = next(steps)
        batch: WindowBatch = step.batches[0]
        assert not batch.look_backs[0].present.any()
        loss, _ = lanes.step(step)
        results.append((loss.detach(), gradients(module, loss)))
    (zero, zero_gradients), (nan, nan_gradients) = results
    assert torch.equal(zero, nan)
    for name, gradient in nan_gradients.items():
        assert torch.equal(gradient, zero_gradients[name]), name
