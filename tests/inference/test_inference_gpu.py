"""Generation on a CUDA device: near the CPU's logits, and one wait for the device a token."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from inference_samples import (
    EOS,
    VARIANTS,
    model_config,
    prefer,
    random_ids,
    sample_model,
    sample_stm,
    words,
    words_tokenizer,
)

from rxt_dist.inference import Conversation, Sampling, generate
from rxt_dist.inference.decoding import Continuation
from rxt_dist.kernels.attention import set_attention_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Widths that the grouped matrix product takes: where it cannot run, experts wait for the device.
CONFIG = model_config(
    embed_dim=64,
    decoder={"ff_dim": 32, "attention": {"query_heads": 4, "kv_heads": 2}, "stateless_layers": ["moe"]},
)


@pytest.fixture(autouse=True)
def _restored_backend() -> Iterator[None]:
    yield
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)


def stm_of(lanes: int) -> torch.Tensor:
    return torch.randn(2, lanes, 6, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["auto", "varlen", "sdpa"])
def test_cached_bf16_decoding_is_near_fp32_on_the_cpu(backend: str) -> None:
    prompts, following = [random_ids(n, n) for n in (5, 1, 11)], random_ids(12, 99)
    logits = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        place = torch.device(device)
        set_attention_backend(backend if device == "cuda" else "sdpa", place, dtype)
        model = sample_model(CONFIG).to(place, dtype)
        continuation = Continuation(model.decoder, 3, stm_of(3).to(place))
        found = [continuation.feed(prompts)]
        for number, token in enumerate(following):
            if number == 4:
                continuation.keep([0, 2])
            found.append(continuation.step(torch.tensor([token] * (3 if number < 4 else 2), device=place)))
        logits[device] = torch.cat(found).float().cpu()
    assert (logits["cuda"] - logits["cpu"]).abs().max() < 0.05 * logits["cpu"].abs().max()


@pytest.mark.parametrize("name", ["moe", "reverse", "stateless", "causal-cross"])
def test_fp32_on_cuda_is_fp32_on_the_cpu(name: str) -> None:
    logits = {}
    for device in ("cpu", "cuda"):
        model = sample_model(VARIANTS[name]).to(device)
        continuation = Continuation(model.decoder, 2, sample_stm(2).to(device))
        found = [continuation.feed([random_ids(4, 1), random_ids(9, 2)])]
        found += [continuation.step(torch.tensor([t, t + 1], device=device)) for t in range(11, 20)]
        logits[device] = torch.cat(found).cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=20, top_p=0.9)])
def test_a_token_waits_for_the_device_once(sampling: Sampling) -> None:
    """Twenty more tokens of three conversations cost twenty more waits, reading the tokens."""
    set_attention_backend("auto", torch.device("cuda"), torch.bfloat16)
    model = sample_model(CONFIG)
    prefer(model, EOS, -1e4)
    model.to("cuda", torch.bfloat16)

    def waits(tokens: int) -> int:
        batch = [Conversation(model, words_tokenizer(), seed=seed) for seed in range(3)]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                generate(
                    batch, [words(random_ids(n, n)) for n in (2, 5, 9)], sampling=sampling, max_tokens=tokens
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    waits(5)  # first use of every kernel
    assert waits(25) - waits(5) == 20
