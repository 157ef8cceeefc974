"""Continuing sequences token by token: the loop that every kind of generation shares.

Shape legend: B sequences, L memory layers, S STM slots, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rxt_dist.errors import CheckpointError
from rxt_dist.inference.sampler import Sampling, choose
from rxt_dist.model import Decoder, Memory, SequenceLayout
from rxt_dist.model.cache import KeysValues
from rxt_dist.model.memory import stm_groups
from rxt_dist.randomness import fold_in_tensor, signed_key


class Continuation:
    """B sequences that a decoder continues, all of them by some tokens at a time.

    Keys and values of the STM are made once and those of the tokens are kept, so that a pass costs what its
    own tokens cost. ``stm`` is [L, B, S, D] in any dtype; None skips the memory cross-attention.
    """

    def __init__(self, decoder: Decoder, sequences: int, stm: torch.Tensor | None) -> None:
        self._decoder = decoder
        self._device = decoder.embedding.weight.device
        self._sequences = sequences
        self._cache = decoder.new_cache(sequences)
        self._memory: list[KeysValues] | None = None
        if stm is not None:
            self._slots = torch.arange(stm.shape[2], device=self._device)
            with torch.no_grad():
                self._memory = decoder.read(stm.to(decoder.embedding.weight).flatten(1, 2))
        self._one_each = _one_each(sequences, self._device)

    def feed(self, tokens: Sequence[Sequence[int]], tail: int = 1) -> torch.Tensor:
        """Take in tokens of every sequence, at least ``tail`` each.

        Returns logits [B * tail, V] of what follows each of the last ``tail`` tokens of every sequence.
        """
        lengths = [len(some) for some in tokens]
        flat = torch.tensor([token for some in tokens for token in some], device=self._device)
        ends = torch.tensor(lengths).cumsum(0)[:, None]
        rows = (ends + torch.arange(-tail, 0)).flatten().to(self._device)
        return self._pass(flat, SequenceLayout.from_lengths(lengths, self._device), lengths, rows)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take in one token of every sequence, int64 [B]; logits [B, V]. Does not wait for the device."""
        return self._pass(tokens, self._one_each, [1] * self._sequences, None)

    def keep(self, sequences: Sequence[int]) -> torch.Tensor:
        """Go on with these alone, by their numbers; returns the numbers, int64 on the device."""
        index = _to_device(sequences, self._device)
        if self._memory is not None:
            rows = (index[:, None] * len(self._slots) + self._slots).flatten()
            self._memory = [KeysValues(*(x.index_select(0, rows) for x in pair)) for pair in self._memory]
        self._cache.keep(sequences, index)
        self._sequences = len(sequences)
        self._one_each = _one_each(self._sequences, self._device)
        return index

    @torch.no_grad()
    def _pass(
        self,
        tokens: torch.Tensor,
        layout: SequenceLayout,
        added: Sequence[int],
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        memory = None
        if self._memory is not None:
            memory = Memory(self._memory, stm_groups(self._sequences, len(self._slots), layout))
        hidden = self._decoder(tokens, self._cache.begin(layout, added), memory, self._cache).hidden
        logits: torch.Tensor = self._decoder.lm_head(hidden if rows is None else hidden[rows])
        return logits


def continue_sequences(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    stm: torch.Tensor | None,
    limits: Sequence[int],
    end_token: int,
    sampling: Sampling,
    keys: Sequence[int],
) -> Iterator[list[tuple[int, int]]]:
    """Generate the tokens of B sequences, one a step.

    Args:
        prompts: ids, at least one each; stm: [L, B, S, D] or None.
        limits: most tokens of each sequence, at least 1; keys: 64-bit keys of their random numbers. What
            a sequence draws depends on its key and the step alone, not on the other sequences.
        end_token: ends a sequence, as its last token.

    Yields:
        (sequence, token) of every sequence that has not ended yet.

    Raises:
        CheckpointError: the model gives no distribution to draw from.
    """
    continuation = Continuation(decoder, len(prompts), stm)
    logits = continuation.feed(prompts)
    numbers = _to_device([signed_key(key) for key in keys], logits.device)
    active = list(range(len(prompts)))
    step = 0
    while True:
        drawn = choose(logits, sampling, fold_in_tensor(numbers, step))
        tokens = drawn.tolist()  # the one place that waits for the device
        if -1 in tokens:
            raise CheckpointError(
                "the model's logits are not finite: its weights are damaged, or too large for "
                f"{str(logits.dtype).removeprefix('torch.')}"
            )
        yield list(zip(active, tokens, strict=True))
        step += 1
        going = [
            place
            for place, (sequence, token) in enumerate(zip(active, tokens, strict=True))
            if token != end_token and step < limits[sequence]
        ]
        if not going:
            return
        if len(going) < len(active):
            active = [active[place] for place in going]
            index = continuation.keep(going)
            drawn, numbers = drawn[index], numbers[index]
        logits = continuation.step(drawn)


def _one_each(sequences: int, device: torch.device) -> SequenceLayout:
    """The layout of one new token for every sequence, made on the device."""
    numbers = torch.arange(sequences + 1, device=device)
    return SequenceLayout(numbers.to(torch.int32), 1, torch.zeros_like(numbers[1:]), numbers[:-1])


def _to_device(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 on ``device``, without waiting for it."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
