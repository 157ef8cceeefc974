"""Speed of generation: cached against uncached decoding, and the cost of the n-th interaction.

    python benchmarks/generate.py --config alpha
    python benchmarks/generate.py --config micro --device cuda --precision bf16 --batch 32

A fresh model of the configuration (speed does not depend on the weights) with random prompts; no answer ends
before its last token. "uncached" computes the whole sequence anew for every token. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# A launcher starts this file by its path: make the packages importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit

from rxt_dist.config import ModelConfig, load_config
from rxt_dist.data.tokens import SPECIAL_TOKENS
from rxt_dist.errors import ConfigError, exit_with_message
from rxt_dist.inference import Conversation, Sampling, generate
from rxt_dist.inference.decoding import Continuation
from rxt_dist.inference.models import DTYPES
from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import Memory, RxTModel, SequenceLayout, build_model
from rxt_dist.model.stm import initial_stm

SPECIAL = dict(zip(("pad", "unk", "bos", "eos", "mask", "query", "answer"), range(7), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="name or file of a model or run configuration")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a query (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="conversations at once (default: %(default)s)")
    parser.add_argument(
        "--interactions", type=int, default=16, help="of one conversation (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    arguments = parser.parse_args(argv)
    return exit_with_message(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    device, dtype = torch.device(arguments.device), DTYPES[arguments.precision]
    backend = set_attention_backend("auto", device, dtype)
    model = _model(arguments.config).to(device, dtype).eval()
    _check(arguments, model.config)
    parameters = sum(p.numel() for p in model.decoder.parameters())
    print(
        f"{model.config.name}: decoder of {parameters:,} parameters, {arguments.precision} on {device}, "
        f"attention {backend}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    _decoding(model, arguments)
    _interactions(model, arguments)
    return 0


def _model(name: str) -> RxTModel:
    """A model with a vocabulary, whose answers never end."""
    config = load_config(name, require_data=False).model
    size = config.card_vocab_size or 512 if config.vocab_size == "auto" else config.vocab_size
    values = config.model_dump() | {"vocab_size": size, "special_tokens": SPECIAL}
    model = build_model(ModelConfig.model_validate(values), seed=0)
    with torch.no_grad():
        model.decoder.lm_head.bias[: len(SPECIAL_TOKENS)] = -1e4
    return model


def _check(arguments: argparse.Namespace, config: ModelConfig) -> None:
    for name in ("prompt", "tokens", "batch", "interactions", "repeats"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}: found {getattr(arguments, name)}; valid: 1 or more")
    room = config.seq_len - 3  # [BOS] [Q] and [A]
    if arguments.prompt + arguments.tokens > room:
        raise ConfigError(
            f"--prompt and --tokens: found {arguments.prompt} + {arguments.tokens}; at most {room} together "
            f"fit into the seq_len of {config.name}"
        )


def _decoding(model: RxTModel, arguments: argparse.Namespace) -> None:
    """Tokens a second of one sequence and of a batch, with and without the cache."""
    print(f"\n{arguments.tokens} tokens after {arguments.prompt}, tokens/s and ms a token")
    print(f"{'sequences':>10}{'cached':>12}{'ms':>8}{'uncached':>12}{'ms':>8}{'ratio':>8}")
    for batch in sorted({1, arguments.batch}):
        seconds = [
            _median(partial(function, model, batch, arguments.prompt, arguments.tokens), arguments.repeats)
            for function in (_cached, _uncached)
        ]
        cells = "".join(
            f"{batch * arguments.tokens / s:>12,.0f}{1e3 * s / arguments.tokens:>8.2f}" for s in seconds
        )
        print(f"{batch:>10}{cells}{seconds[1] / seconds[0]:>8.1f}")


def _prompts(model: RxTModel, batch: int, length: int) -> list[list[int]]:
    vocabulary = model.decoder.lm_head.bias.shape[0]
    generator = np.random.default_rng(0)
    tokens: list[list[int]] = generator.integers(len(SPECIAL_TOKENS), vocabulary, (batch, length)).tolist()
    return tokens


def _cached(model: RxTModel, batch: int, prompt: int, tokens: int) -> None:
    stm = initial_stm(model.config, 0).to(model.decoder.embedding.weight.device).expand(-1, batch, -1, -1)
    continuation = Continuation(model.decoder, batch, stm)
    logits = continuation.feed(_prompts(model, batch, prompt))
    for _ in range(tokens - 1):
        logits = continuation.step(logits.argmax(dim=-1))
    logits.argmax(dim=-1).tolist()


@torch.no_grad()
def _uncached(model: RxTModel, batch: int, prompt: int, tokens: int) -> None:
    device = model.decoder.embedding.weight.device
    stm = initial_stm(model.config, 0).to(device, model.decoder.embedding.weight.dtype)
    sequences = torch.tensor(_prompts(model, batch, prompt), device=device)
    for _ in range(tokens):
        layout = SequenceLayout.from_lengths([sequences.shape[1]] * batch, device)
        memory = Memory.of_stm(stm.expand(-1, batch, -1, -1), layout)
        hidden = model.decoder(sequences.flatten(), layout, memory).hidden
        logits = model.decoder.lm_head(hidden.view(batch, sequences.shape[1], -1)[:, -1])
        sequences = torch.cat((sequences, logits.argmax(dim=-1, keepdim=True)), dim=1)
    sequences.tolist()


def _interactions(model: RxTModel, arguments: argparse.Namespace) -> None:
    """Seconds of each interaction of a conversation: prompt, answer, memory update."""
    names = [
        *SPECIAL_TOKENS,
        *(f"w{n}" for n in range(len(SPECIAL_TOKENS), model.decoder.lm_head.bias.shape[0])),
    ]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    query = " ".join(f"w{token}" for token in _prompts(model, 1, arguments.prompt)[0])
    seconds: list[list[float]] = [[] for _ in range(arguments.interactions)]
    for seed in range(arguments.repeats + 1):
        conversation = Conversation(model, tokenizer, seed=seed)
        for number in range(arguments.interactions):
            start = time.perf_counter()
            generate([conversation], [query], sampling=Sampling(), max_tokens=arguments.tokens)
            conversation.stm.sum().item()
            if seed:  # the first conversation warms up
                seconds[number].append(time.perf_counter() - start)
    print(
        f"\nn-th interaction of a conversation ({arguments.prompt} tokens asked, {arguments.tokens} answered)"
    )
    print(f"{'n':>10}{'ms':>12}")
    for number, times in enumerate(seconds, start=1):
        if number & (number - 1) == 0 or number == arguments.interactions:
            print(f"{number:>10}{1e3 * statistics.median(times):>12.1f}")


def _median(function: Callable[[], None], repeats: int) -> float:
    """Median seconds of ``function``, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
