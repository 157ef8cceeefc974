"""Measured rates of rxlm, the framework that the published models were trained with.

docs/performance-log.md says how they were measured. They hold for one H100 80GB and sequences of 256 tokens
without padding, which is the best case for a framework that pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.model.model import count_parameters

SEQUENCE = 256
DEVICE = "H100"
PARAMETERS = {"rxt-alpha": 155_590_432, "rxt-alpha-micro": 12_228_044}
"""Of the measured models, the embedding counted once: a changed one is another model."""


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    model: str
    vocab_size: int
    stage: str
    batch: int
    """Sequences, or interactions, of a step."""
    tokens_per_second: int
    memory_gib: float | None = None
    compiled: bool = False


FIGURES = (
    Figure("rxt-alpha", 20_000, "joint_lm", 64, 86_700, 20),
    Figure("rxt-alpha", 20_000, "joint_lm", 128, 166_500, 40),
    Figure("rxt-alpha", 20_000, "joint_lm", 192, 179_900, 58),
    Figure("rxt-alpha-micro", 7_500, "joint_lm", 256, 584_000, 16.3),
    Figure("rxt-alpha-micro", 7_500, "joint_lm", 1024, 951_000, 65.9),
    Figure("rxt-alpha-micro", 7_500, "joint_lm", 1024, 1_054_000, compiled=True),
    Figure("rxt-alpha", 20_000, "memory_attention", 256, 515_000, 14.1),
    Figure("rxt-alpha", 20_000, "memory_attention", 512, 592_000, 27.4),
    Figure("rxt-alpha", 20_000, "smat", 64, 58_400, 26),
    Figure("rxt-alpha", 20_000, "smat", 128, 104_900, 51),
    Figure("rxt-alpha", 20_000, "smat", 192, 117_100, 76),
)


def comparable(
    config: RunConfig, stage: StageConfig, lengths: Sequence[int], device: str, ranks: int
) -> list[Figure]:
    """The figures that a measurement on sequences of ``lengths`` may be compared with, the best one last."""
    same_shape = DEVICE in device and ranks == 1 and set(lengths) == {SEQUENCE} and config.precision == "bf16"
    if not same_shape or (stage.uses_lanes and config.batch.window != 1) or stage.components != "joint":
        return []
    name, vocab_size = config.model.name, config.model.vocab_size
    assert isinstance(vocab_size, int)
    if count_parameters(config.model, vocab_size)["unique"] != PARAMETERS.get(name):
        return []
    wanted = (name, vocab_size, stage.name)
    found = [figure for figure in FIGURES if (figure.model, figure.vocab_size, figure.stage) == wanted]
    return sorted(found, key=lambda figure: figure.tokens_per_second)


def comparison(figures: Sequence[Figure], tokens: float, tokens_per_second: float) -> list[str]:
    """Sentences that compare a rate at ``tokens`` a step with ``figures``, the best one last."""
    lines = []
    for figure in figures:
        best = figure is figures[-1]
        if best or round(tokens / SEQUENCE) == figure.batch:
            which = f"{'best batch' if best else 'batch'} ({figure.batch}{', compiled' * figure.compiled})"
            ratio = tokens_per_second / figure.tokens_per_second
            lines.append(
                f"{ratio:.2f} x the {figure.tokens_per_second:,} tokens/s of rxlm 0.3.92 at its {which}"
            )
    return lines
