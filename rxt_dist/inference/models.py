"""Loading a model for use."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from tokenizers import Tokenizer

from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.interchange.pretrained import Pretrained, load_pretrained
from rxt_dist.kernels.attention import set_attention_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_model(path: Path, needed: Collection[str], *, device: str, precision: str) -> Pretrained:
    """Load a native folder, run or checkpoint with a tokenizer and the components ``needed``.

    ``device`` is a torch device or ``auto`` (a GPU where there is one); ``precision`` one of ``DTYPES``.
    Chooses the attention backend of this process.

    Raises:
        CheckpointError: nothing usable is there, or it lacks a component or a tokenizer.
        ConfigError: there is no such device.
    """
    place = _device(device)
    dtype = DTYPES[precision]
    pretrained = load_pretrained(path, device=place, dtype=dtype)
    check_components(pretrained, needed, str(path))
    tokenizer_of(pretrained, str(path))
    set_attention_backend("auto", place, dtype)
    return pretrained


def check_components(pretrained: Pretrained, needed: Collection[str], source: str = "the model") -> None:
    """Raises CheckpointError, which calls the model ``source``, unless it has all components ``needed``."""
    missing = [name for name in needed if name not in pretrained.components]
    if missing:
        found = ", ".join(sorted(pretrained.components))
        raise CheckpointError(f"{source} has no {' and no '.join(missing)}, which this needs; found: {found}")


def tokenizer_of(pretrained: Pretrained, source: str = "the model") -> Tokenizer:
    """Its tokenizer; raises CheckpointError, which calls the model ``source``, when it has none."""
    if pretrained.tokenizer is None:
        raise CheckpointError(f"{source} has no tokenizer; add its tokenizer.json to the folder")
    return pretrained.tokenizer


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device: found {name!r}, which is not usable here ({reason}); valid: auto, cpu, cuda"
        ) from error
    return device
