"""Fresh memories, lanes that must not touch one another, and the memory attention objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.lanes import (
    SLOTS,
    Interaction,
    Lanes,
    MemoryPieces,
    Recorder,
    fresh_stm,
    gradients,
    lane_config,
    lane_model,
    lane_module,
    other_words,
    plain_write,
    random_conversations,
    size_of,
    timeline,
    windows,
)

from rxt_dist.config import RunConfig
from rxt_dist.data.lane_loader import LaneInteractions, WindowStep
from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.stages.lane_stage import FreshMemory

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
LANES, WINDOW = 4, 2
WRITING = "name: memory_attention, steps: 4"


class TestFreshMemory:
    @pytest.mark.parametrize("distribution", ["standard", "normal", "uniform"])
    def test_a_draw_is_a_pure_function_of_the_visit(self, distribution: str) -> None:
        config = lane_config(model__stm_init=f"{{distribution: {distribution}, shared: false}}")
        fresh = FreshMemory(config)
        visits = torch.tensor([0, 5, 3, 5])
        drawn = fresh.draw(visits)
        assert drawn.shape == (2, 4, SLOTS, 64)
        assert drawn.dtype == torch.float32
        assert torch.equal(drawn[:, 1], drawn[:, 3])
        assert not torch.equal(drawn[:, 0], drawn[:, 2])
        for lane, visit in enumerate(visits.tolist()):
            assert torch.equal(drawn[:, lane : lane + 1], FreshMemory(config).draw(torch.tensor([visit])))
            assert torch.equal(drawn[:, lane : lane + 1], fresh_stm(config, visit))
        other = FreshMemory(config.model_copy(update={"seed": 1})).draw(visits)
        assert not torch.equal(other, drawn)

    def test_a_shared_draw_is_the_same_for_all(self) -> None:
        config = lane_config(model__stm_init="{distribution: normal, shared: true}")
        drawn = FreshMemory(config).draw(torch.tensor([0, 5, 3]))
        assert torch.equal(drawn[:, 0], drawn[:, 1])
        assert torch.equal(drawn[:, 0], drawn[:, 2])
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[:, :, 0], drawn[:, :, 1])

    @pytest.mark.parametrize("stage", ["name: smat, steps: 4", WRITING])
    def test_a_reset_uses_the_visit_of_the_new_conversation(self, stage: str) -> None:
        config = lane_config(f"{{{stage}}}")
        module, source = lane_module(config), MemoryPieces(random_conversations(COUNTS))
        stm = torch.full((2, LANES, SLOTS, 64), 9.0)
        with windows(source, window=6) as steps:
            next(steps)
            step = next(steps)
        mixed = 0
        for at in step.batches[0].positions:
            found = module.with_resets(stm, at)
            mixed += bool(at.reset.any()) and not bool(at.reset.all())
            for lane in range(LANES):
                visit = int(at.visits[lane])
                reset = bool(at.reset[lane])
                expected = fresh_stm(config, visit)[:, 0] if reset else stm[:, lane]
                assert torch.equal(found[:, lane], expected)
        assert mixed > 0


def answers(config: RunConfig, conversations: Any, steps: int, **options: Any) -> Iterator[Any]:
    """(STM, hidden states) of every (position, lane) of a SMAT run without updates."""
    module = lane_module(config)
    recorder, lanes = Recorder(module), Lanes(module, config)
    with windows(MemoryPieces(conversations), window=WINDOW, **options) as loader, torch.no_grad():
        for _ in range(steps):
            lanes.step(next(loader))
    for position, (memory, hidden) in enumerate(zip(recorder.memories, recorder.hidden, strict=True)):
        for lane in range(memory.shape[1]):
            yield (position, lane), memory[:, lane], hidden[lane]


class TestIsolation:
    """The same run twice, with other words in some conversations."""

    POSITIONS = 12

    def changed_places(
        self, changed: set[int], conversations: Any
    ) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
        """Places (position, lane) whose answers differ between the two runs, and those that should."""
        config = lane_config()
        altered = [
            [other_words(one) for one in conversation] if number in changed else conversation
            for number, conversation in enumerate(conversations)
        ]
        steps = self.POSITIONS // WINDOW
        before, after = (answers(config, c, steps) for c in (conversations, altered))
        different, memories = set(), set()
        for (place, stm, hidden), (_, other_stm, other_hidden) in zip(before, after, strict=True):
            if not torch.equal(stm, other_stm):
                memories.add(place)
            if hidden.shape != other_hidden.shape or (hidden - other_hidden).abs().max() > 1e-5:
                different.add(place)
        places = timeline(MemoryPieces(conversations), LANES, self.POSITIONS)
        expected = {
            (t, lane)
            for t, row in enumerate(places)
            for lane, p in enumerate(row)
            if p.conversation in changed
        }
        assert memories == {(t, lane) for t, lane in expected if places[t][lane].number > 0}
        return different, expected

    @pytest.mark.parametrize("conversation", range(len(COUNTS)))
    def test_a_conversation_changes_its_own_answers_only(self, conversation: int) -> None:
        """Not those of the next conversation of its lane, and not those of other lanes."""
        different, expected = self.changed_places({conversation}, random_conversations(COUNTS))
        assert different == expected
        assert different

    def test_all_conversations_of_a_rank_change_nothing_on_the_other_ranks(self) -> None:
        conversations = random_conversations([6] * 8)
        places = timeline(MemoryPieces(conversations), LANES, 6)
        changed = {place.conversation for row in places for place in row[:2]}
        config = lane_config()
        results = []
        for own in (set(), changed):
            altered = [
                [other_words(one) for one in conversation] if number in own else conversation
                for number, conversation in enumerate(conversations)
            ]
            module = lane_module(config)
            ranks = []
            for rank in range(2):
                lanes = Lanes(module, config)
                with windows(MemoryPieces(altered), window=WINDOW, rank=rank, ranks=2) as loader:
                    steps = [next(loader) for _ in range(3)]
                own_lanes = slice(2 * rank, 2 * rank + 2)
                ranks.append([(lanes.step(step)[1], lanes.stm[:, own_lanes].clone()) for step in steps])
            results.append(ranks)
        (first, second), (other_first, other_second) = results
        for (values, stm), (other_values, other_stm) in zip(second, other_second, strict=True):
            assert torch.equal(values, other_values)
            assert torch.equal(stm, other_stm)
        for (values, _), (other_values, _) in zip(first, other_first, strict=True):
            assert abs(values[0] - other_values[0]) > 1e-4

    @pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 2), (2, 1), (4, 1)])
    def test_lanes_have_the_same_memories_on_any_mesh(self, ranks: int, micro: int) -> None:
        conversations = random_conversations(COUNTS)
        for stage in ("name: smat, steps: 4", f"{WRITING}, noise_level: 0.1, label_weight_jitter: 0.15"):
            config = lane_config(f"{{{stage}}}")
            module = lane_module(config)
            look_back = "smat" in stage
            whole, parts = Lanes(module, config), Lanes(module, config)
            with windows(MemoryPieces(conversations), window=3, look_back=look_back) as loader:
                steps = [next(loader) for _ in range(4)]
            expected = [(whole.step(step)[1], whole.stm.clone()) for step in steps]
            for number in range(4):
                total = torch.zeros(())
                for rank in range(ranks):
                    with windows(
                        MemoryPieces(conversations), window=3, rank=rank, ranks=ranks, micro=micro,
                        look_back=look_back,
                    ) as loader:  # fmt: skip
                        step = [next(loader) for _ in range(number + 1)][-1]
                    total = total + parts.step(step)[1]
                torch.testing.assert_close(total, expected[number][0], rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(parts.stm, expected[number][1], rtol=0, atol=1e-5)


def writing(**fields: float) -> RunConfig:
    """A run of stage memory_attention with these fields."""
    return lane_config(f"{{{WRITING}" + "".join(f", {k}: {v}" for k, v in fields.items()) + "}")


def interactions(numbers: list[int], visits: list[int] | None = None) -> LaneInteractions:
    """One-token interactions with these numbers in their conversations."""
    count = len(numbers)
    empty = torch.zeros(0, dtype=torch.int64)
    return LaneInteractions(
        tokens=torch.zeros(count, dtype=torch.int64),
        layout=SequenceLayout.from_lengths([1] * count),
        token_keys=torch.arange(count),
        next_index=empty,
        next_targets=empty,
        target_marks=empty.to(torch.uint8),
        present=torch.ones(count, dtype=torch.bool),
        reset=torch.tensor(numbers) == 0,
        visits=torch.tensor(visits or range(count)),
        numbers=torch.tensor(numbers),
    )


class TestLabelWeights:
    def test_the_new_data_weighs_less_with_every_interaction(self) -> None:
        module = lane_module(writing())
        expected = [0.9, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.05, 0.05]
        found = module.label_weights(interactions(list(range(12))))
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)

    def test_the_floor_is_a_setting(self) -> None:
        module = lane_module(writing(label_weight_floor=0.32))
        found = module.label_weights(interactions([0, 3, 4, 5, 30]))
        torch.testing.assert_close(found, torch.tensor([0.9, 0.35, 0.32, 0.32, 0.32]), rtol=0, atol=1e-6)

    def test_jitter_is_one_even_draw_for_every_interaction(self) -> None:
        module = lane_module(writing(label_weight_jitter=0.04))
        numbers, visits = [2] * 2000, list(range(2000))
        shifts = module.label_weights(interactions(numbers, visits)) - 0.4
        assert shifts.abs().max() <= 0.04 + 1e-6
        assert shifts.abs().max() > 0.0398
        assert abs((shifts > 0).float().mean() - 0.5) < 0.05
        assert abs(shifts.abs().mean() - 0.02) < 0.002
        assert len(set(shifts.tolist())) > 1900

    def test_jitter_is_a_function_of_visit_and_number_alone(self) -> None:
        module = lane_module(writing(label_weight_jitter=0.15))
        found = module.label_weights(interactions([3, 3, 4, 3], [7, 8, 7, 7]))
        assert found[0] == found[3]
        assert found[0] != found[1]
        assert found[0] - 0.35 != found[2] - 0.3
        again = lane_module(writing(label_weight_jitter=0.15))
        assert torch.equal(again.label_weights(interactions([3, 4], [8, 7])), found[[1, 2]])

    def test_weights_stay_shares(self) -> None:
        module = lane_module(writing(label_weight_jitter=1.0))
        found = module.label_weights(interactions([0, 20] * 200, list(range(400))))
        assert found.min() == 0.0
        assert found.max() == 1.0
        assert ((found > 0) & (found < 1)).any()

    def test_evaluation_has_no_jitter(self) -> None:
        module = lane_module(writing(label_weight_jitter=0.15)).eval()
        torch.testing.assert_close(module.label_weights(interactions([0, 2])), torch.tensor([0.9, 0.4]))


def step_of(source: MemoryPieces, window: int = WINDOW, number: int = 0) -> WindowStep:
    with windows(source, window=window, look_back=False) as loader:
        return [next(loader) for _ in range(number + 1)][-1]


def plain_distances(
    config: RunConfig, model: RxTModel, source: MemoryPieces, positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and difference terms of the first positions, slot by slot of one lane after the other."""
    cosines, differences, slots, count = [], [], 0, 0
    for lane in range(LANES):
        stm = torch.zeros(0)
        for row in timeline(source, LANES, positions):
            place = row[lane]
            interaction = source.conversations[place.conversation][place.number]
            before = fresh_stm(config, place.visit) if place.number == 0 else stm
            with torch.no_grad():
                layout = SequenceLayout.from_lengths([len(interaction.tokens)])
                encoded = model.encoder(torch.tensor(interaction.tokens), layout)
            stm = plain_write(model, before, interaction)
            new = 0.9 if place.number == 0 else max(0.05, 0.5 - 0.05 * place.number)
            for slot in range(min(SLOTS, len(interaction.tokens))):
                for layer in range(stm.shape[0]):
                    label = (1 - new) * before.detach()[layer, 0, slot] + new * encoded[layer, slot]
                    row_stm = stm[layer, 0, slot]
                    cosines.append(row_stm @ label / (row_stm.norm() * label.norm()))
                slots += 1
            change = (stm - before).square().mean()
            differences.append(math.sqrt(place.number + 1) * change)
            count += 1
    return -torch.stack(cosines).sum() / stm.shape[0] / slots, torch.stack(differences).sum() / count


class TestMemoryAttentionObjective:
    # Shorter than, as long as, and longer than the STM has slots.
    LENGTHS = (SLOTS - 2, SLOTS, SLOTS + 3)

    def source(self) -> MemoryPieces:
        conversations = random_conversations(COUNTS, seed=4)
        words = [[7], [8, 9, 10], [11, 12, 13, 14, 15, 16]]
        short = Interaction([2, 5, 6, 3], 2, [0] * 4)
        for number, conversation in enumerate(conversations):
            for t in range(len(conversation)):
                length = self.LENGTHS[(number + t) % 3]
                if length == SLOTS - 2:
                    conversation[t] = short
                else:
                    extra = words[2] if length > SLOTS else words[0]
                    query = extra[: length - 5]
                    conversation[t] = Interaction.of(query, [20 + number])
        source = MemoryPieces(conversations)
        assert set(source.lengths.tolist()) == set(self.LENGTHS)
        return source

    @pytest.mark.parametrize("window", [1, 3, 8])
    def test_loss_and_gradients_are_those_of_a_plain_loop(self, window: int) -> None:
        config = writing(stm_difference_scale=0.3)
        source = self.source()
        module, reference = lane_module(config), lane_module(config)
        loss, metrics = Lanes(module, config).step(step_of(source, window))
        cosine, difference = plain_distances(config, reference, source, window)
        expected = cosine + 0.3 * difference
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        values = dict(zip(("loss", *module.metric_names), metrics.tolist(), strict=True))
        assert values["memory_loss"] == pytest.approx(cosine.item(), rel=1e-5)
        assert values["stm_difference"] == pytest.approx(difference.item(), rel=1e-5)
        found, wanted = gradients(module, loss), gradients(reference, expected)
        assert {name.partition(".")[0] for name in found} == {"memory_attention"}
        largest = max(gradient.abs().max() for gradient in wanted.values())
        for name, gradient in found.items():
            scale = max(wanted[name].abs().max(), 1e-4 * largest)
            assert (gradient - wanted[name]).abs().max() <= 1e-5 * scale, name

    def test_the_difference_term_is_only_reported_without_a_scale(self) -> None:
        source = self.source()
        results = []
        for scale in (0.0, 0.3):
            config = writing(stm_difference_scale=scale)
            module = lane_module(config)
            loss, metrics = Lanes(module, config).step(step_of(source))
            results.append((loss.item(), metrics[1].item(), metrics[2].item()))
        (off, cosine, difference), (on, same_cosine, same_difference) = results
        assert (cosine, difference) == (same_cosine, same_difference)
        assert difference > 0
        assert off == cosine
        assert on == pytest.approx(cosine + 0.3 * difference, rel=1e-6)

    def test_a_lane_carries_the_memory_after_the_last_write(self) -> None:
        config, source = writing(), self.source()
        module, model = lane_module(config), lane_model(config)
        lanes = Lanes(module, config)
        with windows(source, window=3, look_back=False) as loader, torch.no_grad():
            for number in range(4):
                lanes.step(next(loader))
                assert not lanes.stm.requires_grad
                row = timeline(source, LANES, 3 * number + 3)[-1]
                for lane, place in enumerate(row):
                    stm = fresh_stm(config, place.visit)
                    for interaction in source.conversations[place.conversation][: place.number + 1]:
                        stm = plain_write(model, stm, interaction)
                    assert (lanes.stm[:, lane] - stm[:, 0]).abs().max() <= 1e-5

    def test_tokens_beyond_the_last_slot_are_written_but_have_no_label(self) -> None:
        """Another last token of a long interaction changes the memory, not which slots count."""
        config = writing()
        module = lane_module(config)
        long, short = Interaction.of([7, 8, 9, 10], [11]), Interaction([2, 5, 6, 3], 2, [0] * 4)
        for interaction, slots in ((long, SLOTS), (short, 4)):
            step = step_of(MemoryPieces([[interaction] * 2] * 4))
            assert step.counts["slots"] == slots * LANES * WINDOW
            assert module.local_counts(step.batches[0])["slots"] == step.counts["slots"]

    def test_local_counts_are_the_counts_of_the_plan(self) -> None:
        for stage in (f"{{{WRITING}}}", "{name: smat, steps: 4}"):
            module = lane_module(lane_config(stage))
            step = step_of(self.source(), window=3)
            found = module.local_counts(step.batches[0])
            assert found == {name: step.counts[name] for name in found}

    def test_noise_is_a_function_of_the_token_keys(self) -> None:
        """Equal for equal tokens of equal visits on any mesh, and off in evaluation."""
        source = self.source()
        for field in ("noise_level", "label_noise_level"):
            config, silent = writing(**{field: 1.0}), writing()
            losses = {}
            for name, (one, micro, training) in {
                "silent": (silent, 4, True),
                "noisy": (config, 4, True),
                "again, one lane at a time": (config, 1, True),
                "evaluation": (config, 4, False),
            }.items():
                module = lane_module(one).train(training)
                with windows(source, window=2, micro=micro, look_back=False) as loader:
                    losses[name] = Lanes(module, one).step(next(loader))[0].item()
            assert losses["again, one lane at a time"] == pytest.approx(losses["noisy"], rel=1e-5)
            assert losses["evaluation"] == losses["silent"]
            assert abs(losses["noisy"] - losses["silent"]) > 1e-4

    def test_noise_of_input_and_label_have_their_levels_and_nothing_in_common(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both are seen from outside: what is written, and the labels, which are made from clean data."""
        seen: dict[float, tuple[list[torch.Tensor], list[torch.Tensor]]] = {0.0: ([], []), 0.5: ([], [])}
        cosine = F.cosine_similarity
        step = step_of(self.source(), window=1)
        for level, (inputs, labels) in seen.items():
            module = lane_module(writing(noise_level=level / 2, label_noise_level=level))
            module.memory_attention.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[1].detach())
            )

            def recorded(
                rows: torch.Tensor, label: torch.Tensor, labels: Any = labels, **options: Any
            ) -> torch.Tensor:
                labels.append(label.detach())
                return cosine(rows, label, **options)

            monkeypatch.setattr(F, "cosine_similarity", recorded)
            Lanes(module, writing()).step(step)
        # A conversation's first interaction: nothing random is in a label but its own noise.
        (noisy_input,), (noisy_label,) = seen[0.5]
        (clean_input,), (clean_label,) = seen[0.0]
        noises = [(noisy_input - clean_input) / 0.25, (noisy_label - clean_label) / 0.5]
        for noise in noises:
            assert abs(noise.mean()) < 0.05
            assert noise.std() == pytest.approx(1.0, rel=0.03)
            tokens = noise.flatten(0, 1)  # every layer and token has its own
            similarity = (tokens @ tokens.T / tokens.shape[1]).fill_diagonal_(0)
            assert similarity.abs().max() < 0.6
        assert (noises[0] * noises[1]).mean().abs() < 0.05

    def test_only_memory_attention_trains(self) -> None:
        config = writing(stm_difference_scale=0.1)
        module = lane_module(config)
        found = gradients(module, Lanes(module, config).step(step_of(self.source()))[0])
        assert size_of(found, "memory_attention") > 1e-4
        assert all(name.startswith("memory_attention") for name in found)
        assert all(parameter.grad is None for parameter in module.encoder.parameters())
