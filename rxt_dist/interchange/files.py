"""Safetensors files: reading and writing them piece by piece.

Nothing here unpickles anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rxt_dist.errors import CheckpointError

TENSOR_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
# A file is mapped into memory, and what was touched stays there until it is closed: it is opened anew
# whenever this much has been read, so that reading a file does not cost its size in memory.
_READ_BYTES = 64 << 20


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for.

    A name that the file's metadata declares as an alias of a stored one ({dropped: kept}) is a name like
    any other; ``remarks`` is what else the metadata says. ``shapes`` and ``dtypes`` are known without
    reading; a tensor that was taken out is valid for as long as it is held.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than floating point numbers;
            an alias leads to a tensor that is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file = self._open()
        self._read_bytes = 0
        for name in self._file.keys():  # noqa: SIM118 (no mapping: it has keys() alone)
            part = self._file.get_slice(name)
            self._add(name, tuple(part.get_shape()), part.get_dtype())
        metadata = self._file.metadata() or {}
        # A tensor's name has a dot.
        self.remarks = {key: value for key, value in metadata.items() if "." not in key}
        self.aliases = self._aliases(metadata)
        for dropped, kept in self.aliases.items():
            self.shapes[dropped], self.dtypes[dropped] = self.shapes[kept], self.dtypes[kept]

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is not a sound safetensors file: {error}") from error

    def _add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {dtype}; expected one of {', '.join(_DTYPES)}"
            )
        self.shapes[name], self.dtypes[name] = shape, _DTYPES[dtype]

    def _aliases(self, metadata: Mapping[str, str]) -> dict[str, str]:
        aliases = {}
        for dropped in metadata.keys() - self.remarks.keys() - self.shapes.keys():
            kept = metadata[dropped]
            if kept not in self.shapes:
                raise CheckpointError(
                    f"{self.path}: {dropped} is stored as an alias of {kept}, which the file does not hold"
                )
            aliases[dropped] = kept
        return aliases

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(self.aliases.get(name, name))
        self._read_bytes += tensor.numel() * tensor.element_size()
        if self._read_bytes > _READ_BYTES:
            self._read_bytes = 0
            self._file = self._open()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, each tensor in its own dtype.

    ``tensors`` may be views of any layout on any device: they are laid out one at a time, so that writing
    does not cost the model's size in memory. ``metadata`` are aliases and remarks.

    Raises:
        CheckpointError: the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    try:
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                stream.write(values.numpy().data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found a {type(content).__name__}; expected an object")
    return content
