"""Sample continuations for a person to read next to the losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from rxt_dist.config import EvaluationConfig
from rxt_dist.data.pieces import PieceSource
from rxt_dist.model import SequenceLayout
from rxt_dist.stages import StageModule

_PROMPT_TOKENS = 12  # of a text; an interaction's prompt is its whole query


def sample_continuations(
    module: StageModule,
    source: PieceSource,
    tokenizer: Tokenizer,
    settings: EvaluationConfig,
    *,
    seq_len: int,
    end_token: int,
    device: torch.device,
) -> list[dict[str, str]]:
    """Continue the beginnings of the first validation pieces; ``prompt`` and ``continuation`` texts.

    Greedy at temperature 0. A continuation ends at [EOS], after ``settings.sample_tokens`` tokens or
    at ``seq_len``. Empty when the stage has no decoder. No collective operation.
    """
    pieces = [source.read(index) for index in range(min(settings.samples, len(source.lengths)))]
    lengths = [
        piece.first_target if piece.first_target > 1 else min(_PROMPT_TOKENS, len(piece.tokens) // 2)
        for piece in pieces
    ]
    prompts = [piece.tokens[: max(1, length)].tolist() for piece, length in zip(pieces, lengths, strict=True)]
    if not prompts or not module.generates:
        return []
    generator = torch.Generator(device=device).manual_seed(0)
    was_training = module.training
    module.eval()
    sequences = [list(prompt) for prompt in prompts]
    active = list(range(len(sequences)))
    with torch.no_grad():
        for _ in range(settings.sample_tokens):
            active = [i for i in active if len(sequences[i]) < seq_len and sequences[i][-1] != end_token]
            if not active:
                break
            layout = SequenceLayout.from_lengths([len(sequences[i]) for i in active], device)
            tokens = torch.tensor([token for i in active for token in sequences[i]], device=device)
            logits = module.next_token_logits(tokens, layout)
            for i, token in zip(active, _choose(logits, settings.temperature, generator), strict=True):
                sequences[i].append(token)
    module.train(was_training)
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=False),
            "continuation": tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=False),
        }
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    """One token a row of ``logits`` [B, V]."""
    if temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1)]
    probabilities = F.softmax(logits.float() / temperature, dim=-1)
    return [int(token) for token in torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)]
