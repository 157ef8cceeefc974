"""Decoding with cached keys and values gives the logits of decoding everything anew, at every step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inference_samples import SEQ_LEN, VARIANTS, model_config, random_ids, sample_model, sample_stm

from rxt_dist.inference.decoding import Continuation
from rxt_dist.interchange.reference import load_reference
from rxt_dist.model import Memory, RxTModel, SequenceLayout

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
PROMPTS = [7, 1, 12, 4]  # tokens of the sequences' beginnings
STEPS = 9


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that is taken but not written holds NaN: whoever attends to an unused place shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def uncached(model: RxTModel, ids: list[int], stm: torch.Tensor | None) -> torch.Tensor:
    """Logits [tokens, V] of one sequence by itself, in one pass without a cache."""
    layout = SequenceLayout.from_lengths([len(ids)])
    memory = None if stm is None else Memory.of_stm(stm, layout)
    with torch.no_grad():
        logits: torch.Tensor = model.decoder.lm_head(model.decoder(torch.tensor(ids), layout, memory).hidden)
    return logits


@pytest.mark.parametrize("with_memory", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_step_gives_the_logits_of_the_whole_sequence(name: str, with_memory: bool) -> None:
    model = sample_model(VARIANTS[name])
    sequences = [random_ids(prompt + STEPS, seed) for seed, prompt in enumerate(PROMPTS)]
    stm = sample_stm(len(PROMPTS)) if with_memory else None
    expected = [
        uncached(model, ids, None if stm is None else stm[:, i : i + 1]) for i, ids in enumerate(sequences)
    ]
    continuation = Continuation(model.decoder, len(PROMPTS), stm)
    logits = continuation.feed([ids[:prompt] for ids, prompt in zip(sequences, PROMPTS, strict=True)])
    active = list(range(len(PROMPTS)))
    for step in range(STEPS):
        for row, i in enumerate(active):
            torch.testing.assert_close(logits[row], expected[i][PROMPTS[i] + step - 1], rtol=1e-5, atol=1e-5)
        if step in (3, 6):  # a sequence ends: first the one in the middle, then the first
            gone = 2 if step == 3 else 0
            continuation.keep([row for row, i in enumerate(active) if i != gone])
            active.remove(gone)
        tokens = torch.tensor([sequences[i][PROMPTS[i] + step] for i in active])
        logits = continuation.step(tokens)


def test_several_tokens_at_once_continue_too() -> None:
    model = sample_model(VARIANTS["stateless"])
    sequences, stm = [random_ids(15, 1), random_ids(11, 2)], sample_stm(2)
    expected = [uncached(model, ids, stm[:, i : i + 1]) for i, ids in enumerate(sequences)]
    continuation = Continuation(model.decoder, 2, stm)
    first, second = sequences
    continuation.feed([first[:2], second[:6]])
    torch.testing.assert_close(
        continuation.feed([first[2:12], second[6:8]], tail=2),
        torch.cat((expected[0][10:12], expected[1][6:8])),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        continuation.feed([first[12:], second[8:]], tail=3),
        torch.cat((expected[0][12:], expected[1][8:])),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in FIXTURES.glob("dec_*.pt")))
def test_recorded_cached_logits_of_published_decoders(name: str) -> None:
    """Positions 5 to 11 of a sequence, recorded from the published implementation's cached decoding."""
    fixture = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    decoder = load_reference(fixture["cls"], fixture["config"], fixture["state_dict"]).module
    ids = fixture["input_ids"][0]
    continuation = Continuation(decoder, 1, fixture["stm"][:, :1])  # type: ignore[arg-type]
    continuation.feed([ids[:5].tolist()])
    logits = torch.cat([continuation.step(ids[i : i + 1]) for i in range(5, 12)])
    expected = fixture["cached_logits"][0]
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-6


def test_the_memory_is_read_once() -> None:
    """However many tokens are generated, each layer makes keys and values of its memory once."""
    model = sample_model(VARIANTS["moe"])
    calls = {"stm_norm": 0, "kv": 0}
    for layer in model.decoder.layers:
        for name, module in (("stm_norm", layer.stm_norm), ("kv", layer.cross_attention.kv)):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    continuation = Continuation(model.decoder, 2, sample_stm(2))
    continuation.feed([random_ids(3, 1), random_ids(8, 2)])
    for token in random_ids(10, 3):
        continuation.step(torch.tensor([token, token]))
    assert calls == {"stm_norm": 2, "kv": 2}


def test_bf16_stays_near_fp32() -> None:
    model = sample_model(model_config())
    ids, stm = random_ids(20, 4), sample_stm(1)
    expected = uncached(model, ids, stm)
    continuation = Continuation(model.to(torch.bfloat16).decoder, 1, stm)
    logits = [continuation.feed([ids[:6]])]
    logits += [continuation.step(torch.tensor([token])) for token in ids[6:]]
    found = torch.cat(logits)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected[5:]).abs().max() < 0.05 * expected.abs().max()


def test_the_cache_grows_by_what_is_generated() -> None:
    model = sample_model(VARIANTS["dense"])
    continuation = Continuation(model.decoder, 1, None)
    continuation.feed([random_ids(3, 1)])
    sizes = []
    for token in random_ids(SEQ_LEN - 3, 2):
        continuation.step(torch.tensor([token]))
        sizes.append(continuation._cache.layers[0]._stored.keys.shape[1])  # type: ignore[union-attr]
    assert sizes == sorted(sizes)
    assert all(size < 2 * (3 + step + 1) for step, size in enumerate(sizes)), "room for twice as many at most"
