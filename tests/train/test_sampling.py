"""Continuations of held-out beginnings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from rxt_dist.config import EvaluationConfig
from rxt_dist.data.pieces import Piece
from rxt_dist.model import SequenceLayout
from rxt_dist.train.sampling import sample_continuations

VOCAB = 30
END = 3


class Pieces:
    """Pieces of the tokens 10, 11, ...; ``lengths`` are (tokens, first target)."""

    def __init__(self, *lengths: tuple[int, int]) -> None:
        self.first_targets = [first for _, first in lengths]
        self.lengths = np.array([length for length, _ in lengths])
        self.lost = lambda pieces: np.zeros(len(pieces), dtype=np.bool_)

    def read(self, piece: int) -> Piece:
        return Piece(np.arange(10, 10 + self.lengths[piece]), self.first_targets[piece])


class Successor(torch.nn.Module):
    """Predicts the number after the last token; after ``last`` comes the end."""

    generates = True

    def __init__(self, last: int = VOCAB) -> None:
        super().__init__()
        self.last = last
        self.calls: list[list[int]] = []

    def next_token_logits(self, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        assert not self.training
        ends = layout.cu_seqlens[1:].long() - 1
        self.calls.append(layout.cu_seqlens.diff().tolist())
        following = torch.where(tokens[ends] >= self.last, END, tokens[ends] + 1)
        return torch.nn.functional.one_hot(following, VOCAB).float() * 9


def sample(
    module: Any, pieces: Pieces, seq_len: int = 100, **settings: Any
) -> list[tuple[list[int], list[int]]]:
    """Prompt and continuation as token numbers."""
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    found = sample_continuations(
        module,
        pieces,  # type: ignore[arg-type]
        words,
        EvaluationConfig.model_validate(settings),
        seq_len=seq_len,
        end_token=END,
        device=torch.device("cpu"),
    )
    return [tuple([int(w) for w in text.split()] for text in pair.values()) for pair in found]  # type: ignore[misc]


def test_an_interaction_is_prompted_with_its_whole_query() -> None:
    """Up to the first target, and continued greedily for the number of tokens asked for."""
    assert sample(Successor(), Pieces((8, 5)), samples=1, sample_tokens=3) == [
        ([10, 11, 12, 13, 14], [15, 16, 17])
    ]


def test_a_text_is_prompted_with_its_beginning() -> None:
    found = sample(Successor(), Pieces((40, 1), (6, 1), (1, 1)), samples=3, sample_tokens=1)
    assert found == [([*range(10, 22)], [22]), ([10, 11, 12], [13]), ([10], [11])]


def test_a_continuation_ends_with_the_end_token_or_at_the_longest_sequence() -> None:
    module = Successor(last=14)
    found = sample(module, Pieces((8, 3), (8, 5)), samples=2, sample_tokens=9)
    assert found == [([10, 11, 12], [13, 14, END]), ([10, 11, 12, 13, 14], [END])]
    assert module.calls == [[3, 5], [4], [5]], "a finished sequence is not computed any more"
    assert sample(Successor(), Pieces((8, 5)), seq_len=7, samples=1, sample_tokens=9)[0][1] == [15, 16]


def test_no_more_samples_than_pieces_and_none_without_a_decoder() -> None:
    assert len(sample(Successor(), Pieces((8, 5), (8, 5)), samples=5, sample_tokens=1)) == 2
    assert sample(Successor(), Pieces((8, 5)), samples=0) == []
    encoder = Successor()
    encoder.generates = False
    assert sample(encoder, Pieces((8, 5)), samples=1) == []


def test_a_temperature_draws_the_same_at_every_evaluation() -> None:
    class Even(Successor):
        def next_token_logits(self, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
            return torch.zeros(layout.num_sequences, VOCAB)

    settings = {"samples": 2, "sample_tokens": 12, "temperature": 1.0}
    first, second = (sample(Even(), Pieces((8, 5), (8, 5)), **settings) for _ in range(2))
    assert first == second
    assert len(set(first[0][1])) > 3


def test_the_mode_of_the_module_is_restored() -> None:
    module = Successor().train()
    sample(module, Pieces((8, 5)), samples=1, sample_tokens=1)
    assert module.training
