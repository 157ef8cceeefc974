"""Sample continuations for a person to read next to the losses."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer

from rxt_dist.config import EvaluationConfig
from rxt_dist.data.pieces import PieceSource
from rxt_dist.inference.sampler import Sampling, choose
from rxt_dist.model import SequenceLayout
from rxt_dist.randomness import derive_key, fold_in_tensor, signed_key
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
    first = np.arange(min(settings.samples, len(source.lengths)))
    pieces = [source.read(index) for index in first[~source.lost(first)].tolist()]
    lengths = [
        piece.first_target if piece.first_target > 1 else min(_PROMPT_TOKENS, len(piece.tokens) // 2)
        for piece in pieces
    ]
    prompts = [piece.tokens[: max(1, length)].tolist() for piece, length in zip(pieces, lengths, strict=True)]
    if not prompts or not module.generates:
        return []
    sampling = Sampling(temperature=settings.temperature)
    keys = torch.tensor([signed_key(derive_key("sample", i)) for i in range(len(prompts))], device=device)
    was_training = module.training
    module.eval()
    sequences = [list(prompt) for prompt in prompts]
    active = list(range(len(sequences)))
    with torch.no_grad():
        for step in range(settings.sample_tokens):
            active = [i for i in active if len(sequences[i]) < seq_len and sequences[i][-1] != end_token]
            if not active:
                break
            layout = SequenceLayout.from_lengths([len(sequences[i]) for i in active], device)
            tokens = torch.tensor([token for i in active for token in sequences[i]], device=device)
            logits = module.next_token_logits(tokens, layout)
            drawn = choose(logits, sampling, fold_in_tensor(keys[active], step))
            for i, token in zip(active, drawn.tolist(), strict=True):
                sequences[i].append(end_token if token < 0 else token)  # nothing to draw from: diverged
    module.train(was_training)
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=False),
            "continuation": tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=False),
        }
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]
