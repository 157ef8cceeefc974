"""Conversations with a model: a query is answered while the memory is read, then both are written into it.

Shape legend: L memory layers, B conversations, S STM slots, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer

from rxt_dist.errors import CheckpointError, ConfigError, DataError
from rxt_dist.inference.decoding import Continuation, continue_sequences
from rxt_dist.inference.memory_file import read_memory, write_memory
from rxt_dist.inference.models import check_components, tokenizer_of
from rxt_dist.inference.sampler import Sampling
from rxt_dist.inference.text import TextStream, decode, encode, special_tokens
from rxt_dist.interchange.pretrained import Pretrained
from rxt_dist.model import RxTModel, SequenceLayout
from rxt_dist.model.stm import initial_stm
from rxt_dist.randomness import derive_key

COMPONENTS = ("encoder", "decoder", "memory_attention")
_GREEDY = Sampling()


@dataclass(frozen=True)
class Reply:
    """An answer that was generated.

    Attributes:
        text: the answer, without special tokens.
        tokens: its ids, without [A], with [EOS] where the model gave one.
        complete: whether it ended with [EOS]; False: it was stopped by a limit.
    """

    text: str
    tokens: list[int]
    complete: bool


class Conversation:
    """One conversation and its memory.

    Randomness is counter-based: what is drawn depends on ``seed``, the number of the write and the place in
    the answer, and on nothing else. The model is put into evaluation mode.

    Args:
        model: with encoder, decoder and memory attention, its special tokens known.
        tokenizer: of the model.
        seed: of the fresh memory and of what is sampled, in [0, 2^63).
        initial: [L, 1, S, D], the memory that a conversation starts from; None draws one.

    Raises:
        ConfigError: ``seed`` is out of range, or the model's special tokens are not known.
    """

    def __init__(
        self, model: RxTModel, tokenizer: Tokenizer, *, seed: int = 0, initial: torch.Tensor | None = None
    ) -> None:
        if not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed: found {seed}; valid: 0 to 2^63 - 1")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.seed = seed
        self.special = special_tokens(model.config)
        self._device = model.encoder.embedding.weight.device
        self._initial = initial
        self.reset()

    @classmethod
    def begin(cls, pretrained: Pretrained, seed: int = 0) -> Self:
        """A conversation with a model from files.

        It starts from the memory stored with the model if all its conversations share one, and else from
        one drawn for ``seed``. Raises CheckpointError when a component or the tokenizer is missing.
        """
        check_components(pretrained, COMPONENTS)
        shared = pretrained.model.config.stm_init.shared
        initial = pretrained.stm if shared else None
        return cls(pretrained.model, tokenizer_of(pretrained), seed=seed, initial=initial)

    def reset(self) -> None:
        """Forget everything: the memory is again the one that the conversation began with."""
        initial = self._initial
        if initial is None:
            initial = initial_stm(self.model.config, self.seed)
        self.stm = initial.to(self._device, torch.float32)
        """fp32 [L, 1, S, D]; replaced, never changed in place."""
        self.writes = 0
        """Interactions written so far, a system prompt included."""

    def init_stm(self, system: str) -> None:
        """Write a system prompt into the memory, as [BOS] and the text, before the first query.

        Raises:
            ConfigError: the conversation has begun already.
            DataError: the prompt is longer than ``seq_len``.
        """
        if self.writes:
            raise ConfigError(f"system prompt: the memory holds {self.writes} interactions; reset it first")
        tokens = [self.special.bos, *encode(self.tokenizer, system, "system prompt")]
        self._check_length("the system prompt", tokens, self.model.config.seq_len)
        _write([self], [tokens])

    def ask(self, query: str, *, sampling: Sampling = _GREEDY, max_tokens: int | None = None) -> Reply:
        """Answer ``query`` and remember both; arguments and errors are those of :func:`generate`."""
        return generate([self], [query], sampling=sampling, max_tokens=max_tokens)[0]

    def stream(
        self, query: str, *, sampling: Sampling = _GREEDY, max_tokens: int | None = None
    ) -> ReplyStream:
        """As :meth:`ask`, giving the answer's text piece by piece."""
        return ReplyStream(self, _Turn([self], [query], sampling, max_tokens))

    def replay(self, query: str, answer: str) -> torch.Tensor:
        """Remember an interaction as if the model had answered so.

        Returns fp32 [a, V], the logits that the model had for each token of the answer after [A], the
        closing [EOS] included. Raises DataError when the interaction is longer than ``seq_len``.
        """
        prompt = self.prompt(query)
        tokens = encode(self.tokenizer, answer, "answer")
        interaction = [*prompt, *tokens, self.special.eos]
        self._check_length("the interaction", interaction, self.model.config.seq_len)
        continuation = Continuation(self.model.decoder, 1, self.stm)
        logits = continuation.feed([interaction[:-1]], tail=len(tokens) + 1)
        _write([self], [interaction])
        return logits.float()

    def prompt(self, query: str) -> list[int]:
        """[BOS] [Q] query [A], the ids that an answer follows.

        Raises:
            DataError: the query leaves no room for an answer within ``seq_len``.
        """
        special = self.special
        ids = [special.bos, special.query, *encode(self.tokenizer, query, "query"), special.answer]
        self._check_length("the query", ids, self.model.config.seq_len - 1)
        return ids

    def _check_length(self, what: str, tokens: Sequence[int], limit: int) -> None:
        if len(tokens) > limit:
            raise DataError(
                f"{what} has {len(tokens)} tokens with the special ones; at most {limit} fit into the "
                f"model's seq_len of {self.model.config.seq_len}"
            )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that it takes to go on: ``stm`` fp32 [L, 1, S, D]; ``seed`` and ``writes``, int64 []."""
        return {"stm": self.stm, "seed": torch.tensor(self.seed), "writes": torch.tensor(self.writes)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], source: str = "the state") -> None:
        """Continue from :meth:`state_dict`; ``source`` names it in errors.

        Raises:
            CheckpointError: an entry is missing, unknown, of another shape, or not a finite number.
        """
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted({*expected, *found}):
            if found.get(name) != expected.get(name):
                raise CheckpointError(
                    f"{source}: {name} has shape {found.get(name, 'none (missing)')}; this model needs "
                    f"{expected.get(name, 'no such entry')}"
                )
        if not state["stm"].isfinite().all():
            raise CheckpointError(f"{source}: stm holds numbers that are not finite")
        self.stm = state["stm"].to(self._device, torch.float32)
        self.seed, self.writes = int(state["seed"]), int(state["writes"])

    def save(self, path: str | Path) -> None:
        """Write the state into a safetensors file; CheckpointError when that is not possible."""
        write_memory(Path(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Continue from a file of :meth:`save`; CheckpointError when it is no such file of this model."""
        self.load_state_dict(read_memory(Path(path)), f"memory file {path}")


class ReplyStream(Iterator[str]):
    """The text of an answer, piece by piece; every piece ends where a character ends.

    When the last piece was taken and the iteration ends, the interaction is written into the memory and
    ``reply`` is set. A stream that is abandoned before leaves the memory as it was.
    """

    def __init__(self, conversation: Conversation, turn: _Turn) -> None:
        self.reply: Reply | None = None
        self._pieces = self._run(conversation, turn)

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, conversation: Conversation, turn: _Turn) -> Iterator[str]:
        text = TextStream(conversation.tokenizer)
        for step in turn.steps():
            if piece := "".join(text.push(token) for _, token in step):
                yield piece
        if piece := text.finish():
            yield piece
        self.reply = turn.finish()[0]


def generate(
    conversations: Sequence[Conversation],
    queries: Sequence[str],
    *,
    sampling: Sampling = _GREEDY,
    max_tokens: int | None = None,
) -> list[Reply]:
    """Answer one query in each conversation, all at once, and write the interactions into their memories.

    Every answer is what the conversation would have got alone.

    Args:
        conversations: distinct, of one model; queries: one for each.
        max_tokens: most tokens of an answer, [EOS] included; None: as many as ``seq_len`` leaves room for.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a query is no Unicode text, or leaves no room for an answer; nothing was changed.
        CheckpointError: the model's logits are not finite; nothing was changed.
    """
    turn = _Turn(conversations, queries, sampling, max_tokens)
    for _ in turn.steps():
        pass
    return turn.finish()


class _Turn:
    """One interaction of each of B conversations, from the queries to the written memories."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        queries: Sequence[str],
        sampling: Sampling,
        max_tokens: int | None,
    ) -> None:
        if len(queries) != len(conversations):
            raise ConfigError(f"queries: found {len(queries)}; valid: one for each of {len(conversations)}")
        if len({id(one) for one in conversations}) < len(conversations):
            raise ConfigError("conversations: found one twice; valid: distinct ones")
        if any(one.model is not conversations[0].model for one in conversations):
            raise ConfigError("conversations: found several models; valid: conversations of one model")
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens: found {max_tokens}; valid: 1 or more")
        self._conversations = conversations
        self._prompts = [one.prompt(query) for one, query in zip(conversations, queries, strict=True)]
        self._before = [one.stm for one in conversations]
        self._sampling, self._max_tokens = sampling, max_tokens
        self._answers: list[list[int]] = [[] for _ in conversations]

    def steps(self) -> Iterator[list[tuple[int, int]]]:
        """(conversation, token) of all answers that have not ended, step by step."""
        if not self._conversations:
            return
        model = self._conversations[0].model
        room = [model.config.seq_len - len(prompt) for prompt in self._prompts]
        for step in continue_sequences(
            model.decoder,
            self._prompts,
            stm=torch.cat(self._before, dim=1),
            limits=[min(most, self._max_tokens or most) for most in room],
            end_token=self._conversations[0].special.eos,
            sampling=self._sampling,
            keys=[derive_key(one.seed, "sample", one.writes) for one in self._conversations],
        ):
            for conversation, token in step:
                self._answers[conversation].append(token)
            yield step

    def finish(self) -> list[Reply]:
        """Write the interactions into the memories."""
        for one, before in zip(self._conversations, self._before, strict=True):
            if one.stm is not before:
                raise ConfigError("the conversation went on before this answer was finished")
        _write(
            self._conversations,
            [[*prompt, *answer] for prompt, answer in zip(self._prompts, self._answers, strict=True)],
        )
        return [
            Reply(decode(one.tokenizer, answer), answer, answer[-1] == one.special.eos)
            for one, answer in zip(self._conversations, self._answers, strict=True)
        ]


@torch.no_grad()
def _write(conversations: Sequence[Conversation], interactions: Sequence[Sequence[int]]) -> None:
    """Write one interaction into the memory of each conversation: encode it, then memory attention."""
    if not conversations:
        return
    model = conversations[0].model
    stm = torch.cat([one.stm for one in conversations], dim=1)
    layout = SequenceLayout.from_lengths([len(tokens) for tokens in interactions], stm.device)
    tokens = torch.tensor([token for some in interactions for token in some], device=stm.device)
    written = model.memory_attention(stm, model.encoder(tokens, layout), layout)
    for one, memory in zip(conversations, written.split(1, dim=1), strict=True):
        one.stm = memory.contiguous()
        one.writes += 1
