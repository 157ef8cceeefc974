"""Models in files: one way to load them, whatever wrote them, and one to save them.

Shape legend: L layers, S STM slots, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from rxt_dist.checkpoint import CheckpointReader, locate_checkpoint
from rxt_dist.config import load_config
from rxt_dist.data.tokens import load_tokenizer
from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.files import CONFIG_FILE, TENSOR_FILE
from rxt_dist.interchange.native import (
    COMPONENTS,
    NativeReader,
    belongs,
    check_vocabulary,
    is_native,
    write_native,
)
from rxt_dist.model import RxTModel
from rxt_dist.model.canonical import canonical_parts, named_tensors
from rxt_dist.model.moe import Router
from rxt_dist.model.stm import initial_stm

_RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Pretrained:
    """A model from files.

    Attributes:
        model: in evaluation mode. Parameters of a component that is not in ``components`` are on the meta
            device: they hold nothing. ``special_tokens`` of its configuration can be ``auto`` only where
            ``tokenizer`` is None.
        tokenizer: None where the files have none.
        components: whose weights are there, of encoder, decoder, mlm_head and memory_attention.
        stm: [L, 1, S, D], a stored initial memory, or None.
    """

    model: RxTModel
    tokenizer: Tokenizer | None
    components: frozenset[str]
    stm: torch.Tensor | None


def load_pretrained(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Pretrained:
    """Load a native folder, or the newest sound checkpoint of a run folder, or a checkpoint folder.

    ``dtype`` is that of all weights; None keeps what is stored. A checkpoint has all components, and the
    initial memory of its run.

    Raises:
        CheckpointError: nothing of this kind is there, a file is damaged, or a tensor is missing, unexpected
            or of another shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a native model folder, a run or a checkpoint")
    if not any((path / name).exists() for name in (CONFIG_FILE, TENSOR_FILE)):
        return _load_checkpoint(path, torch.device(device), dtype)
    if not is_native(path):
        raise CheckpointError(f"{path} is a published model; make a native folder of it with `rxt import`")
    return _load_native(NativeReader(path), torch.device(device), dtype)


def save_pretrained(
    folder: str | Path,
    model: RxTModel,
    *,
    tokenizer: Tokenizer | None,
    components: Collection[str],
    stm: torch.Tensor | None = None,
) -> None:
    """Write a native folder that appears complete or not at all; every tensor keeps its dtype and bits.

    Args:
        folder: must not exist, or be empty.
        tokenizer: whose tokens are the model's vocabulary, or None.
        components: of encoder, decoder, mlm_head and memory_attention, those that are written.
        stm: [L, 1, S, D], an initial memory, or None.

    Raises:
        CheckpointError: ``folder`` is in the way or cannot be written; a component is unknown or without
            weights; ``tokenizer`` or ``stm`` does not fit the model.
    """
    valid = ", ".join(COMPONENTS)
    if not components or not set(components) <= set(COMPONENTS):
        raise CheckpointError(f"components: found {', '.join(components) or 'none'}; valid: {valid}")
    empty = [name for name, p in model.named_parameters() if p.is_meta and belongs(name, components)]
    if empty:
        raise CheckpointError(f"components: {empty[0].partition('.')[0]} has no weights; leave it out")
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config, "tokenizer")
        if model.config.special_tokens == "auto":
            raise CheckpointError("model.special_tokens: found auto; valid with a tokenizer: the ids of all")
    if stm is not None and stm.shape[1:2] != (1,):
        raise CheckpointError(f"stm has the shape {tuple(stm.shape)}; expected (layers, 1, STM slots, width)")
    write_native(Path(folder), model, components, tokenizer, stm)


def _load_native(reader: NativeReader, device: torch.device, dtype: torch.dtype | None) -> Pretrained:
    tokenizer, stm = reader.tokenizer(), reader.stm()
    if stm is not None and stm.shape[1] != 1:
        stm = None  # what the conversations of a batch left behind
    with torch.device("meta"):
        model = RxTModel(reader.config)
    reader.check_shapes(model)
    stored = reader.dtypes
    _allocate(model, reader.components, device, lambda names: dtype or widest(stored[n] for n in names))
    reader.load_weights(model, allow_missing=True)
    if stm is not None:
        stm = stm.to(device=device, dtype=dtype)
    return Pretrained(model.eval(), tokenizer, reader.components, stm)


def _load_checkpoint(path: Path, device: torch.device, dtype: torch.dtype | None) -> Pretrained:
    reader = CheckpointReader(locate_checkpoint(path))
    run = load_config(reader.path / _RUN_CONFIG, require_data=False)
    config = run.model
    stm = initial_stm(config, run.seed).to(device)
    with torch.device("meta"):
        model = RxTModel(config)
    _allocate(model, COMPONENTS, torch.device("cpu"), lambda names: torch.float32)
    reader.load_weights(model)
    model.to(device=device, dtype=dtype)
    return Pretrained(model.eval(), load_tokenizer(reader.path), frozenset(COMPONENTS), stm)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds the values of all ``dtypes`` exactly."""
    first, *others = set(dtypes)
    for other in others:
        first = torch.promote_types(first, other)
    return first


def _allocate(
    model: RxTModel,
    components: Collection[str],
    device: torch.device,
    dtype_of: Callable[[list[str]], torch.dtype],
) -> None:
    """Memory for the parameters and buffers of ``components``; only selection biases are filled, with 0.

    ``dtype_of`` gives the dtype of a tensor from the canonical names that it is made of.
    """
    modules = dict(model.named_modules())
    parts = canonical_parts(model)
    for name, tensor in named_tensors(model).items():
        if not belongs(name, components):
            continue
        owner, _, attribute = name.rpartition(".")
        names = [part.name for part in parts[name]]
        empty: Any
        if isinstance(modules[owner], Router):  # a selection bias, which files need not have
            empty = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        else:
            empty = torch.empty(tensor.shape, dtype=dtype_of(names), device=device)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        setattr(modules[owner], attribute, empty)
