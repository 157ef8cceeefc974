"""A small run configuration and batches of random pieces for the tests of the text stages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rxt_dist.config import RunConfig, load_config
from rxt_dist.data.batch import MaskPlan, TextBatch, build_text_batch
from rxt_dist.data.order import Pack
from rxt_dist.data.pieces import Piece
from rxt_dist.model import RxTModel, build_model

VOCAB = 50
MASK = 4
FIRST_ORDINARY = 7
MASKING = 0.3
SPECIAL = "{pad: 0, unk: 1, bos: 2, eos: 3, mask: 4, query: 5, answer: 6}"
BASE = [
    f"model.vocab_size={VOCAB}",
    f"model.special_tokens={SPECIAL}",
    "model.embed_dim=32",
    "model.stm_size=5",
    "stages=[{name: joint_lm, steps: 2}]",
]


def run_config(*overrides: str) -> RunConfig:
    """The run ``tiny`` with a narrow model and one joint stage, changed by ``overrides``."""
    return load_config("tiny", [*BASE, *overrides], require_data=False)


def sample_model(config: RunConfig) -> RxTModel:
    """A model whose biases and norms are not at their special initial values."""
    model = build_model(config.model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


class RandomPieces:
    """Pieces of ordinary tokens; the last ``supervised`` tokens of each are next-token targets."""

    fingerprint = "random"

    def __init__(self, lengths: Sequence[int], supervised: Sequence[int] | None = None) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.supervised = self.lengths - 1 if supervised is None else np.array(supervised, dtype=np.int32)

    def read(self, piece: int) -> Piece:
        tokens = np.random.default_rng(piece).integers(FIRST_ORDINARY, VOCAB, self.lengths[piece])
        return Piece(tokens, int(self.lengths[piece] - self.supervised[piece]))

    def read_tokens(self, pieces: np.ndarray) -> np.ndarray:
        return np.concatenate([self.read(piece).tokens for piece in pieces.tolist()])


PIECES = RandomPieces([7, 12, 3, 9, 1, 5], [6, 4, 2, 8, 0, 1])


def batch_of(
    pieces: Sequence[int], *, source: RandomPieces = PIECES, masking: float = MASKING, epoch: int = 0
) -> TextBatch:
    """The given pieces in this order as one micro-batch."""
    pack = Pack(np.array(pieces, dtype=np.int64), np.full(len(pieces), epoch, dtype=np.int64))
    return build_text_batch(source, pack, MaskPlan(77, masking), MASK)
