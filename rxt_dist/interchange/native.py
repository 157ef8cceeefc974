"""The native folder, in which models are kept apart from runs.

``config.json`` (format version, components, model configuration), ``model.safetensors`` (canonical unfused
tensors by name, the shared embedding once) and, where known, ``tokenizer.json``. A folder may hold some of
the components only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer

from rxt_dist.config import ModelConfig
from rxt_dist.config.problems import explain
from rxt_dist.data.tokens import TOKENIZER_FILE, load_tokenizer
from rxt_dist.errors import CheckpointError
from rxt_dist.files import OutputFolder
from rxt_dist.interchange.files import CONFIG_FILE, TENSOR_FILE, TensorFile, read_json, write_tensors
from rxt_dist.model import RxTModel
from rxt_dist.model.canonical import canonical_parts, named_tensors

COMPONENTS = ("encoder", "decoder", "mlm_head", "memory_attention")
FORMAT_VERSION = 1

_STM = "stm"
_EMBEDDING = "encoder.embedding."
# Not part of models that were not trained with it; it starts from 0.
_SELECTION_BIAS = ".router.selection_bias"
_FIELDS = {"format_version", "components", "list_experts", "model"}


def is_native(path: Path) -> bool:
    """Whether ``path`` is a native folder and not a published one, by its config.json.

    Raises:
        CheckpointError: it has none, or one that cannot be read.
    """
    return "format_version" in read_json(path / CONFIG_FILE)


class NativeReader:
    """Read access to a native folder.

    Attributes:
        config: the model; of a component that is not there it says nothing.
        components: whose weights are there, of ``COMPONENTS``.
        list_experts: whether the decoder was published with every expert by itself, and is exported so.
        dtypes: of the tensors, by canonical name.

    Raises:
        CheckpointError: a file is missing or damaged, or config.json does not have the fields it must have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path / CONFIG_FILE)
        self.config, self.components = _parse(values, path / CONFIG_FILE)
        self.list_experts = values["list_experts"] is True
        self._file = TensorFile(path / TENSOR_FILE)

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return self._file.dtypes

    def load_weights(self, model: RxTModel, *, allow_missing: bool = False) -> list[str]:
        """Fill the tensors of the stored components in place; those of ``model`` keep dtype and device.

        Returns the canonical names that the folder lacks, see :meth:`check_shapes` (only with
        ``allow_missing``). Raises :class:`CheckpointError` as :meth:`check_shapes` does.
        """
        missing = self.check_shapes(model)
        if missing and not allow_missing:
            raise CheckpointError(f"{self.path}: the folder has no tensor {missing[0]}")
        with torch.no_grad():
            tensors = named_tensors(model)
            for name, parts in canonical_parts(model).items():
                if belongs(name, self.components):
                    for part in (part for part in parts if part.name not in missing):
                        part.of(tensors[name].view(-1)).copy_(part.taken_from(self._file[part.name]))
        return missing

    def check_shapes(self, model: RxTModel) -> list[str]:
        """Canonical names of ``model`` (on any device) whose component the folder lacks, and of selection
        biases that it lacks.

        Raises :class:`CheckpointError` unless the folder has every other tensor of its components in the
        model's shape, and no other.
        """
        parts = [part for found in canonical_parts(model).values() for part in found]
        shapes = {part.name: part.shape for part in parts if belongs(part.name, COMPONENTS)}
        expected = {
            name: shape
            for name, shape in shapes.items()
            if belongs(name, self.components) and (name in self._file or not name.endswith(_SELECTION_BIAS))
        }
        for name, shape in expected.items():
            found = self._file.shapes.get(name)
            if found is None:
                raise CheckpointError(f"{self._file.path}: {name} is missing; expected the shape {shape}")
            if found != shape:
                raise CheckpointError(f"{self._file.path}: {name} has the shape {found}; expected {shape}")
        for name, found in self._file.shapes.items():
            if name not in expected and name != _STM:
                raise CheckpointError(
                    f"{self._file.path}: found {name} of the shape {found}; expected no tensor of this name"
                )
        return [name for name in shapes if name not in expected]

    def stm(self) -> torch.Tensor | None:
        """The stored memory [L, B, S, D], if there is one; an initial memory has B = 1."""
        if _STM not in self._file:
            return None
        stm = self._file[_STM].clone()
        check_stm(stm, self.config, f"{self._file.path}: {_STM}")
        return stm

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder, if there is one; its size is that of the vocabulary."""
        if not (self.path / TOKENIZER_FILE).is_file():
            return None
        tokenizer = load_tokenizer(self.path)
        check_vocabulary(tokenizer, self.config, self.path / TOKENIZER_FILE)
        return tokenizer


def write_native(
    folder: Path,
    model: RxTModel,
    components: Collection[str],
    tokenizer: Tokenizer | None,
    stm: torch.Tensor | None,
    *,
    list_experts: bool = False,
) -> None:
    """See :func:`rxt_dist.interchange.pretrained.save_pretrained`, and :class:`NativeReader`."""
    tensors = dict(component_tensors(model, components))
    if stm is not None:
        check_stm(stm, model.config, "stm")
        tensors[_STM] = stm
    description = {
        "format_version": FORMAT_VERSION,
        "components": [name for name in COMPONENTS if name in components],
        "list_experts": list_experts,
        "model": model.config.model_dump(mode="json"),
    }
    with OutputFolder(folder, CheckpointError) as temporary:
        write_tensors(temporary / TENSOR_FILE, tensors)
        if tokenizer is not None:
            (temporary / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (temporary / CONFIG_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def component_tensors(model: RxTModel, components: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, view) of every tensor of ``components`` of a whole model, buffers included."""
    tensors = named_tensors(model)
    for name, parts in canonical_parts(model).items():
        if belongs(name, components):
            flat = tensors[name].detach().view(-1)
            for part in parts:
                yield part.name, part.of(flat).view(part.shape)


def belongs(name: str, components: Collection[str]) -> bool:
    """Whether the tensor ``name`` of an RxTModel is part of one of ``components``."""
    if name.startswith(_EMBEDDING):  # encoder and decoder share it
        return "encoder" in components or "decoder" in components
    return name.partition(".")[0] in components


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: Path | str) -> None:
    """Raises CheckpointError when ``tokenizer`` (from ``source``) does not have the model's vocabulary."""
    size = tokenizer.get_vocab_size()
    if size != config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {size} tokens, the model a vocabulary of {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )


def check_stm(stm: torch.Tensor, config: ModelConfig, source: str) -> None:
    """Raises CheckpointError unless ``stm`` (called ``source``) is a memory [L, B, S, D] of this model."""
    found = tuple(stm.shape)
    expected = (config.decoder.num_layers, *(found[1:2] or (1,)), config.stm_size, config.embed_dim)
    if found != expected:
        raise CheckpointError(
            f"{source} has the shape {found}; expected {expected} (layers, conversations, STM slots, width)"
        )


def _parse(values: Mapping[str, Any], path: Path) -> tuple[ModelConfig, frozenset[str]]:
    """(model configuration, components) in a native config.json."""
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {json.dumps(version)}; this program reads {FORMAT_VERSION}"
        )
    if set(values) != _FIELDS:
        difference = ", ".join(sorted(set(values) ^ _FIELDS))
        raise CheckpointError(f"{path}: missing or unknown fields: {difference}")
    components = values["components"]
    if not isinstance(components, list) or not components or not all(c in COMPONENTS for c in components):
        raise CheckpointError(
            f"{path}: components: found {json.dumps(components)}; valid: a list of {', '.join(COMPONENTS)}"
        )
    try:
        config = ModelConfig.model_validate(values["model"])
    except ValidationError as error:
        raise CheckpointError(f"{path}: model.{explain(error, ModelConfig)[0]}") from error
    if config.vocab_size == "auto":
        raise CheckpointError(f"{path}: model.vocab_size: found auto; valid: the number of tokens")
    return config, frozenset(components)
