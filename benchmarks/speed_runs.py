"""The measurements of benchmarks/speed_table.py: which runs, and how sequences are long.

Sizes are those at which the reference was fastest on one H100 80GB (benchmarks/reference_figures.py), or the
nearest that its 80 GB hold here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

# Simple stories of some 150 words, as TinyStories has, and interactions that are as long.
MEDIAN_LENGTH, SPREAD, DRAWN = 200, 0.35, 4096
SHORTEST = 16

_JOINT = "stages=[{name: joint_lm, steps: 1000}]"
_SMAT = "stages=[{name: smat, steps: 1000}]"
_MEMORY = "stages=[{name: memory_attention, steps: 1000}]"

# The run file has one shared expert and another vocabulary.
_MICRO = ("model=micro", "model.vocab_size=7500")

# The operations of the experts that a token of RxT-Alpha visits, in one feed-forward of every layer.
_DENSE = ("model.decoder.moe=null", "model.decoder.ff_dim=2304")


@dataclass(frozen=True)
class Call:
    """One call of benchmarks/train_step.py.

    Attributes:
        name: of its row; config: run file; overrides: values for ``--set``.
        lengths: values for ``--lengths``; empty: lengths as of real stories (:func:`story_lengths`).
        plain: measure the step without DeepSpeed too.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    lengths: tuple[str, ...] = ("256", "256")
    plain: bool = False

    def arguments(self, lengths_file: Path) -> list[str]:
        """Of the call."""
        lengths = self.lengths or (str(lengths_file),)
        settings = [part for value in self.overrides for part in ("--set", value)]
        plain = ["--without-deepspeed"] if self.plain else []
        return ["--config", self.config, *settings, "--lengths", *lengths, *plain]


def story_lengths(seq_len: int) -> npt.NDArray[np.int64]:
    """Tokens of pieces of stories: lengths that are log-normal, cut at ``seq_len`` as a text stage cuts.

    The same ones in every call.
    """
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN_LENGTH), SPREAD, DRAWN)).astype(np.int64)
    whole = np.repeat(seq_len, int((lengths // seq_len).sum()))
    rests = lengths % seq_len
    return np.concatenate((whole, rests[rests >= SHORTEST]))


def _slice() -> tuple[str, ...]:
    """RxT-Beta's widths and experts with fewer layers and shorter sequences, so that one GPU holds it."""
    layers = ("model.encoder.num_layers=6", "model.decoder.num_layers=6")
    sizes = ("model.seq_len=2048", "model.stm_size=2048", "batch.packs=8", "batch.pack_tokens=8192")
    return ("model=beta", *layers, *sizes)


# The most important first: what time does not allow is left out.
CALLS = (
    Call("alpha joint", "alpha", (_JOINT, "batch.packs=16"), plain=True),
    Call("alpha smat W=1", "alpha", (_SMAT, "batch.lanes=192"), plain=True),
    Call("alpha memory", "alpha", (_MEMORY, "batch.lanes=512")),
    Call("alpha joint twice", "alpha", (_JOINT, "batch.packs=32")),
    Call("alpha smat twice", "alpha", (_SMAT, "batch.lanes=384")),
    Call("micro joint", "micro", (_JOINT, *_MICRO, "batch.packs=64")),
    Call("alpha smat W=4", "alpha", (_SMAT, "batch.lanes=48", "batch.window=4")),
    Call("alpha joint stories", "alpha", (_JOINT, "batch.packs=16"), lengths=()),
    Call("alpha joint dense", "alpha", (_JOINT, "batch.packs=16", *_DENSE)),
    Call("beta slice joint", "alpha", (_JOINT, *_slice()), ("2048", "2048")),
    Call("micro smat W=1", "micro", (_SMAT, *_MICRO, "batch.lanes=512", "batch.window=1")),
    Call("beta slice smat", "alpha", (_SMAT, *_slice(), "batch.lanes=16"), ("2048", "2048")),
    Call("micro memory", "micro", (_MEMORY, *_MICRO, "batch.lanes=512", "batch.window=1")),
    Call("micro smat W=4", "micro", (_SMAT, *_MICRO, "batch.lanes=128", "batch.window=4")),
)
