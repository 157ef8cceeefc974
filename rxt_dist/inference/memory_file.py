"""The memory of a conversation in a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from rxt_dist.errors import CheckpointError
from rxt_dist.files import fsync_folder


def write_memory(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write ``state`` so that ``path`` holds either all of it or what it held before.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.incomplete")
    try:
        with temporary.open("wb") as stream:
            stream.write(save({name: tensor.cpu().contiguous() for name, tensor in state.items()}))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"memory file {path} cannot be written: {error.strerror}") from error


def read_memory(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in ``path``, on the CPU.

    Raises:
        CheckpointError: the file is missing or is not a sound safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"memory file {path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"memory file {path}: not a readable safetensors file: {error}") from error
