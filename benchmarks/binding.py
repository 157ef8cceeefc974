"""Can encoder, memory and decoder learn which value belongs to which object? The smallest problem that asks.

A conversation states the values of K objects, one an interaction, then every object is asked for. All values
are of one kind and all differ, so a model that only remembers which values were said answers 1/K of the
questions. The decoder first reads the encodings of the statements themselves (as in stage context_sft) for
--context-steps steps, then the STM that memory attention wrote from them. Prints a line every --every steps:
recall of the last training steps in what the decoder reads now, and of new conversations through the STM.

    python benchmarks/binding.py --context-steps 0        # stays at 1/K
    python benchmarks/binding.py                          # does not
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rxt_dist.arguments import add_overrides
from rxt_dist.config import ModelConfig, load_config
from rxt_dist.kernels.attention import AttentionLayout, set_attention_backend
from rxt_dist.model import Memory, RxTModel, SequenceLayout, build_model
from rxt_dist.model.stm import initial_stm

OBJECTS, VALUES = 10, 8
_WORDS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]", "[Q]", "[A]", "the", "is", "where", "okay")
_BOS, _EOS, _QUERY, _ANSWER, _THE, _IS, _WHERE, _OKAY = (_WORDS.index(word) for word in (
    "[BOS]", "[EOS]", "[Q]", "[A]", "the", "is", "where", "okay"))  # fmt: skip
_FIRST_OBJECT = len(_WORDS)
_FIRST_VALUE = _FIRST_OBJECT + OBJECTS
_SPECIAL = "{pad: 0, unk: 1, bos: 2, eos: 3, mask: 4, query: 5, answer: 6}"
_STATEMENT = (_BOS, _QUERY, _THE, None, _IS, _THE, None, _ANSWER, _OKAY, _EOS)
_QUESTION = (_BOS, _QUERY, _WHERE, _IS, _THE, None, _ANSWER)


@dataclass(frozen=True)
class Conversations:
    """B conversations of K statements of s tokens and K questions of q tokens.

    Attributes:
        statements: int64 [B, K, s]; questions: int64 [B, K, q]; values: int64 [B, K], the answers.
    """

    statements: torch.Tensor
    questions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def draw(cls, count: int, facts: int, generator: torch.Generator) -> Conversations:
        """``count`` new ones of ``facts`` facts each."""
        objects, values = (
            first + torch.rand(count, words, generator=generator).argsort(1)[:, :facts]
            for first, words in ((_FIRST_OBJECT, OBJECTS), (_FIRST_VALUE, VALUES))
        )
        return cls(_filled(_STATEMENT, objects, values), _filled(_QUESTION, objects), values)


def _filled(pattern: tuple[int | None, ...], *words: torch.Tensor) -> torch.Tensor:
    """The pattern with its gaps filled: int64 [B, K, tokens]."""
    gaps = iter(words)
    columns = [next(gaps) if word is None else torch.full_like(words[0], word) for word in pattern]
    return torch.stack(columns, dim=-1)


class Binding:
    """A model, the memory that its conversations start from, and its optimizer."""

    def __init__(self, config: ModelConfig, seed: int, lr: float) -> None:
        self.model: RxTModel = build_model(config, seed)
        self.start = initial_stm(config, seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.99))

    def step(self, batch: Conversations, *, context: bool) -> float:
        """One optimizer step; returns recall before it."""
        loss, recall = self.answer(batch, context=context)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return recall

    def answer(self, batch: Conversations, *, context: bool) -> tuple[torch.Tensor, float]:
        """Loss of the values and the share that is right, read from encodings (``context``) or the STM."""
        count, facts, length = batch.statements.shape
        layout = SequenceLayout.from_lengths([length] * count)
        encoded = [self.model.encoder(batch.statements[:, k].flatten(), layout) for k in range(facts)]
        if context:
            rows = torch.stack([one.unflatten(1, (count, length)) for one in encoded], dim=2).flatten(2, 3)
        else:
            rows = self.start.expand(-1, count, -1, -1)
            for one in encoded:
                rows = self.model.memory_attention(rows, one, layout)
        asked = batch.questions.shape[2]
        questions = SequenceLayout.from_lengths([asked] * (count * facts))
        groups = torch.arange(count + 1, dtype=torch.int32)
        read = AttentionLayout(groups * (facts * asked), groups * rows.shape[2], facts * asked, rows.shape[2])
        output = self.model.decoder(batch.questions.flatten(), questions, Memory(rows.flatten(1, 2), read))
        last = output.hidden.unflatten(0, (count, facts, asked))[:, :, -1]
        logits = self.model.decoder.lm_head(last)
        recall = (logits.argmax(-1) == batch.values).double().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), batch.values.flatten()), recall


def main() -> int:
    """Run the benchmark; returns 0."""
    arguments = _arguments()
    torch.set_num_threads(1)
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    settings = [f"model.vocab_size={_FIRST_VALUE + VALUES}", f"model.special_tokens={_SPECIAL}"]
    settings += ["model.embed_dim=64", "model.encoder.ff_dim=128", "model.decoder.ff_dim=64"]
    config = load_config("recall", [*settings, *arguments.overrides], require_data=False)
    binding = Binding(config.model, arguments.seed, arguments.lr)
    generator = torch.Generator().manual_seed(arguments.seed)
    recalls = []
    print(f"{arguments.facts} facts, chance {1 / arguments.facts:.3f}\n{'step':>6}  read     recall     STM")
    for step in range(arguments.context_steps + arguments.steps):
        context = step < arguments.context_steps
        batch = Conversations.draw(arguments.conversations, arguments.facts, generator)
        recalls.append(binding.step(batch, context=context))
        if (step + 1) % arguments.every == 0:
            with torch.no_grad():
                new = Conversations.draw(512, arguments.facts, generator)
                held = binding.answer(new, context=False)[1]
            recent = sum(recalls[-arguments.every :]) / arguments.every
            print(
                f"{step + 1:>6}  {'context' if context else 'STM':<8}{recent:>7.3f}{held:>8.3f}", flush=True
            )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--facts", type=int, choices=range(2, VALUES + 1), default=2, help="K (default: 2)")
    parser.add_argument(
        "--context-steps", type=int, default=250, help="reading encodings (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=250, help="reading the STM (default: %(default)s)")
    parser.add_argument("--conversations", type=int, default=64, help="of a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=50, help="steps between lines (default: %(default)s)")
    add_overrides(parser, "model.memory_attention.variant=self_interlayer")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
