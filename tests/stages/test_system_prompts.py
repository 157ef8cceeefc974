"""System prompts: what is written into a memory before the first interaction of a conversation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import Datasets, with_system_prompts
from helpers.lanes import (
    BOS,
    PAD,
    Lanes,
    MemoryPieces,
    Recorder,
    fresh_stm,
    gradients,
    lane_config,
    lane_module,
    plain_answer,
    plain_write,
    random_conversations,
    size_of,
    timeline,
    windows,
)

from rxt_dist.config import RunConfig
from rxt_dist.data.pieces import InteractionPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.parallel.bootstrap import World
from rxt_dist.train.feed import open_feed

COUNTS = [3, 1, 5, 2, 4, 7, 1, 6]
LANES = 4
STAGE = "{name: smat, steps: 9, system_prompts: true}"
PROMPTS = [[BOS, 8 + number, 9] if number % 2 else [] for number in range(len(COUNTS))]


def pieces() -> MemoryPieces:
    return MemoryPieces(random_conversations(COUNTS), PROMPTS)


def plain_start(config: RunConfig, model: RxTModel, visit: int, prompt: list[int]) -> torch.Tensor:
    """The STM [L, 1, S, D] that a conversation's first interaction is answered with."""
    stm = fresh_stm(config, visit)
    if not prompt:
        return stm
    layout = SequenceLayout.from_lengths([len(prompt)])
    return model.memory_attention(stm, model.encoder(torch.tensor(prompt), layout), layout)


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("window", [1, 2, 3])
@torch.no_grad()
def test_every_interaction_is_answered_with_the_memory_of_a_plain_loop(window: int, micro: int) -> None:
    config, source, positions = lane_config(STAGE), pieces(), 24
    module = lane_module(config)
    lanes, recorder = Lanes(module, config), Recorder(module)
    with windows(source, window=window, micro=micro, system_prompts=True) as steps:
        for _ in range(positions // window):
            lanes.step(next(steps))
    model = lane_module(config)
    places = timeline(source, LANES, positions)
    stms: dict[int, torch.Tensor] = {}
    expected = []
    for row in places:
        for lane, place in enumerate(row):
            conversation = source.conversations[place.conversation]
            if place.number == 0:
                stms[lane] = plain_start(config, model, place.visit, PROMPTS[place.conversation])
            else:
                stms[lane] = plain_write(model, stms[lane], conversation[place.number - 1])
        expected.append([stms[lane][:, 0].clone() for lane in range(LANES)])
    found = torch.zeros(positions, LANES, *expected[0][0].shape)
    batches = LANES // micro
    for index, memory in enumerate(recorder.memories):
        step, rest = divmod(index, batches * window)
        lanes_of = slice(rest // window * micro, (rest // window + 1) * micro)
        found[step * window + rest % window, lanes_of] = memory.transpose(0, 1)
    for position, row in enumerate(expected):
        for lane, stm in enumerate(row):
            assert (found[position, lane] - stm).abs().max() <= 1e-6, (position, lane)
    begun = [PROMPTS[p.conversation] != [] for row in places for p in row if p.number == 0]
    assert {*begun} == {True, False}


def test_gradients_of_a_first_answer_go_through_the_write_of_the_prompt() -> None:
    """All conversations begin: without prompts, encoder and memory attention would get none."""
    config = lane_config(STAGE)
    source = MemoryPieces(random_conversations([2] * 4), [[BOS, 8, 9]] * 4)
    for prompts in (True, False):
        module = lane_module(config)
        with windows(source, window=1, system_prompts=prompts) as steps:
            loss, _ = Lanes(module, config).step(next(steps))
        found = gradients(module, loss)
        for component in ("encoder.layers", "memory_attention"):
            assert (size_of(found, component) > 1e-6) == prompts
        if prompts:
            reference = lane_module(config)
            answers = []
            for lane, place in enumerate(timeline(source, LANES, 1)[0]):
                stm = plain_start(config, reference, place.visit, source.prompts[lane])
                answers.append(plain_answer(reference, stm, source.conversations[place.conversation][0]))
            total = torch.stack([a.loss for a in answers]).sum() / sum(a.targets for a in answers)
            balance = torch.stack([a.balance for a in answers]).sum() / sum(a.tokens for a in answers)
            wanted = gradients(reference, total + 0.01 * balance)
            for name, gradient in found.items():
                scale = max(float(wanted[name].abs().max()), 1e-5)
                assert (gradient - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_a_dataset_without_prompts_is_read_as_without_the_option() -> None:
    source = MemoryPieces(random_conversations(COUNTS))
    for window in (1, 3):
        with (
            windows(source, window=window, system_prompts=True) as asked,
            windows(source, window=window) as without,
        ):
            for _ in range(4):
                ours, theirs = next(asked).batches[0], next(without).batches[0]
                for one, other in zip(ours.look_backs, theirs.look_backs, strict=True):
                    assert torch.equal(one.tokens, other.tokens)
                    assert torch.equal(one.present, other.present)


@pytest.mark.parametrize(
    ("option", "seq_len", "expected"),
    [
        ("true", 64, []),
        ("true", 8, ["are longer than seq_len 8 and are cut"]),
        ("false", 64, ["have a system prompt that is not read; set system_prompts: true"]),
    ],
)
def test_what_is_not_read_is_said_once(
    datasets: Datasets, tmp_path: Path, caplog: pytest.LogCaptureFixture, option: str, seq_len: int,
    expected: list[str],
) -> None:  # fmt: skip
    folder = with_system_prompts(datasets, tmp_path)
    config = lane_config(f"{{name: smat, steps: 9, system_prompts: {option}}}")
    source = InteractionPieces(Dataset(folder, "train"), seq_len)
    caplog.clear()
    world = World(0, 0, 1, torch.device("cpu"))
    with open_feed(config, config.stages[0], 0, source, world, None) as feed:
        feed.next_step()
    found = [record.getMessage() for record in caplog.records if record.name == "rxt_dist.train.feed"]
    assert len(found) == len(expected)
    for message, fragment in zip(found, expected, strict=True):
        assert fragment in message
        assert str(folder) in message


def test_what_is_read_of_a_dataset(datasets: Datasets, tmp_path: Path) -> None:
    """Only where a conversation begins, its own prompt, and no more of it than ``seq_len`` tokens."""
    folder = with_system_prompts(datasets, tmp_path)
    whole = Dataset(folder, "train")
    assert {0} < {*whole.system_tokens.tolist()}
    for seq_len in (64, 5):
        source = InteractionPieces(Dataset(folder, "train"), seq_len)
        assert source.prompt_kept.max() <= seq_len
        read = 0
        with windows(source, window=2, system_prompts=True) as steps:
            rows = timeline(source, LANES, 16)
            for number in range(8):
                batch = next(steps).batches[0]
                for w, back in enumerate(batch.look_backs):
                    lengths = back.layout.cu_seqlens.diff().tolist()
                    for lane, tokens in enumerate(back.tokens.split(lengths)):
                        place = rows[2 * number + w][lane]
                        if place.number > 0:
                            continue
                        prompt = whole.system_prompt(place.conversation)[:seq_len]
                        assert bool(back.present[lane]) == (len(prompt) > 0)
                        assert tokens.tolist() == (prompt.tolist() or [PAD])
                        assert int(back.numbers[lane]) == -1
                        read += len(prompt) > 0
        assert read > 2
    keys = np.unique(back.token_keys.numpy())
    assert len(keys) == len(back.token_keys)
