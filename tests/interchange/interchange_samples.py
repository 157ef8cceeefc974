"""Models and tokenizers that the tests of model files share."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from rxt_dist.config import ModelConfig
from rxt_dist.data.tokens import SPECIAL_TOKENS, UNK
from rxt_dist.interchange import export_reference, reference_of
from rxt_dist.model import RxTModel, build_model

VOCAB = 280
IDS = {name: index for index, name in enumerate(("pad", "unk", "bos", "eos", "mask", "query", "answer"))}
SYMMETRIC = {"query_heads": 2, "kv_heads": 2}


def config_of(
    *, memory: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, **top: Any
) -> ModelConfig:
    """A 2-layer model of width 16 with experts; every size is a number of its own."""
    parts = {"num_layers": 2, "heads": 4, "attention": SYMMETRIC}
    moe = {"num_experts": 3, "top_k": 2}
    values = {
        "name": "sample",
        "vocab_size": VOCAB,
        "special_tokens": IDS,
        "embed_dim": 16,
        "seq_len": 24,
        "stm_size": 5,
        "encoder": {**parts, "ff_dim": 12},
        "decoder": {**parts, "ff_dim": 10, "cross_attention": SYMMETRIC, "moe": moe, **(decoder or {})},
        "memory_attention": {"heads": 4, "attention": SYMMETRIC, **(memory or {})},
        **top,
    }
    return ModelConfig.model_validate(values)


def model_of(
    config: ModelConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> RxTModel:
    """A model none of whose parameters or running means has a special value such as 0 or 1."""
    model = build_model(config or config_of(), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model.to(dtype)


def stm_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (config.decoder.num_layers, 1, config.stm_size, config.embed_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def published_tokenizer(size: int = VOCAB, *, names: tuple[str, ...] = SPECIAL_TOKENS[:7]) -> Tokenizer:
    """As published models have it: byte-level, a prefix space, and no decoder."""
    vocabulary = {name: index for index, name in enumerate(names)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrst"][: size - len(vocabulary)]
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    assert len(vocabulary) == size
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def tensors_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype, name
        assert tensor.shape == other.shape, name
        assert torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
        ), name


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@contextmanager
def dying_before(number: int, code: int) -> Iterator[None]:
    """End the process at once before change number ``number`` of the file system."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if function is not opened or "w" in arguments[1]:
                if count == number:
                    os._exit(code)
                count += 1
            return function(*arguments, **options)

        return call

    opened = io.open
    names = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
    originals = [(os, name, getattr(os, name)) for name in names] + [(io, "open", opened)]
    try:
        for module, name, function in originals:
            setattr(module, name, counted(function))
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def write_published(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    aliases: dict[str, str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """A published folder, written with the library that everybody uses; equal rotary tables are aliases."""
    folder.mkdir(parents=True)
    first: dict[str, str] = {}
    stored, metadata = {}, dict(aliases or {})
    for name, tensor in tensors.items():
        component = name.partition(".model.")[0] if ".model." in name else ""
        table = component + name.rpartition(".")[2]
        if ".rope." in name and first.setdefault(table, name) != name:
            metadata[name] = first[table]
        else:
            stored[name] = tensor.contiguous().clone()
    save_file(stored, folder / "model.safetensors", metadata=metadata or None)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def read_published(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """(configuration, stored tensors, metadata) of a published folder."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), metadata


def without_tables(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".rope." not in name}


def full_tensors(model: RxTModel, stm: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of a published full model, component by component."""
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {
        "memory_attention_variant": "self-interlayer",
        "tokenizer_config": {
            f"{name}_token_id": IDS[name] for name in ("pad", "bos", "eos", "query", "answer")
        },
        "tokenizer": None,
    }
    for name in ("encoder", "decoder", "memory_attention"):
        reference = reference_of(getattr(model, name), model.config, stm)
        config[f"{name}_config"], state = export_reference(reference)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return config, tensors


def component_tensors(
    model: RxTModel, name: str, stm: torch.Tensor | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of one published component."""
    return export_reference(reference_of(getattr(model, name), model.config, stm))
