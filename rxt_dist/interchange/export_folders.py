"""A native folder, run or checkpoint -> folders that the published classes read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from rxt_dist.config import ModelConfig
from rxt_dist.data.tokens import TOKENIZER_FILE
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.files import OutputFolder
from rxt_dist.interchange.export import convert_rope_layout, reference_of
from rxt_dist.interchange.files import CONFIG_FILE, TENSOR_FILE, write_tensors
from rxt_dist.interchange.mapping import decoder_entries
from rxt_dist.interchange.native import COMPONENTS, NativeReader
from rxt_dist.interchange.pretrained import Pretrained, load_pretrained
from rxt_dist.interchange.published import (
    CLASS_REMARK,
    FULL_MODEL,
    VARIANT_CLASSES,
    shown_classes,
)
from rxt_dist.interchange.reference import ReferenceModule
from rxt_dist.model import Decoder
from rxt_dist.model.canonical import named_tensors
from rxt_dist.model.stm import draw_stm

FULL = "full"

RopeLayout = Literal["interleaved", "halves"]

# Attentions that rotate; they share the tables of the first one.
_ROTATED = re.compile(
    r"(model\.(?:\w*layers\.\d+\.(?:attention|memory_cross_attention)|attention_layers\.\d+))\.q_proj\.weight"
)


def export_model(
    path: Path, output: Path, components: Sequence[str] = ("all",), rope_layout: RopeLayout = "interleaved"
) -> list[str]:
    """Write the model in ``path`` (a native folder, run or checkpoint) in the published format.

    The full model (encoder, decoder, memory attention) is written into ``output`` itself, each component into
    the subfolder of its name. Every tensor keeps its dtype. A memory that was not stored is drawn.

    Args:
        components: names of components, ``full``, or ``all`` for everything that ``path`` has.
        rope_layout: of the written weights.

    Returns:
        The lines of a report.

    Raises:
        CheckpointError: ``path`` is no model or damaged, lacks a component, or ``output`` is in the way.
        ConfigError: a name is unknown, or the model has what the published classes do not have.
    """
    pretrained = load_pretrained(path, dtype=None)
    native = NativeReader(path) if (path / CONFIG_FILE).is_file() else None
    stm, lists = (None, False) if native is None else (native.stm(), native.list_experts)
    wanted = _wanted(components, pretrained, path)
    config = pretrained.model.config
    report = _variant_remarks(config) if FULL in wanted else []
    if stm is None and {"decoder", "memory_attention", FULL} & set(wanted):
        stm = draw_stm(config, torch.zeros(1, dtype=torch.int64))
        report.append("memory: none stored, one was drawn")
    with OutputFolder(output, CheckpointError) as folder:
        parts = {
            name: _Part(_reference(pretrained, name, stm, lists), rope_layout)
            for name in COMPONENTS
            if name in wanted or (FULL in wanted and name in FULL_MODEL)
        }
        for name in wanted:
            target = folder if name == FULL else folder / name
            target.mkdir(exist_ok=True)
            if name == FULL:
                count = _write_full(target, parts, config)
            else:
                count = parts[name].write(target)
            if pretrained.tokenizer is not None:
                (target / TOKENIZER_FILE).write_text(
                    pretrained.tokenizer.to_str(pretty=True), encoding="utf-8"
                )
            place = output if name == FULL else output / name
            report.append(f"{name}: {count} tensors, {place}")
    return report


def _wanted(components: Sequence[str], pretrained: Pretrained, path: Path) -> list[str]:
    """What is written: components in their order, then ``full``."""
    valid = (*COMPONENTS, FULL, "all")
    for name in components:
        if name not in valid:
            raise ConfigError(f"--components: found {name!r}; valid: {', '.join(valid)}")
    here = [name for name in COMPONENTS if name in pretrained.components]
    if "all" in components:
        return [*here, *([FULL] if set(FULL_MODEL) <= set(here) else [])]
    needed = {part for name in components for part in (FULL_MODEL if name == FULL else (name,))}
    missing = [name for name in COMPONENTS if name in needed and name not in here]
    if missing:
        raise CheckpointError(f"--components: {path} has no {', '.join(missing)}; it has: {', '.join(here)}")
    return [name for name in (*COMPONENTS, FULL) if name in components]


class _Part:
    """A component in the published format, as views of its tensors."""

    def __init__(self, reference: ReferenceModule, layout: RopeLayout) -> None:
        self.cls, self.config = reference.cls, dict(reference.config)
        tensors = named_tensors(reference.module)
        parameters = {entry.key: entry.view(tensors[entry.name].detach()) for entry in reference.entries}
        if layout != self.config.pop("rope_layout", "interleaved"):
            parameters = convert_rope_layout(parameters, self.cls, self.config, layout)
        if layout != "interleaved" and self.cls != "MLMHead":
            self.config["rope_layout"] = layout
        self.tensors: dict[str, torch.Tensor] = {**parameters, **reference.kept}
        self.aliases = _table_aliases(self.tensors)

    def write(self, folder: Path) -> int:
        """Write the component's own folder; returns the number of its tensors."""
        metadata = dict(self.aliases)
        _, sure = shown_classes(self.tensors, self.config)
        if not sure:
            metadata[CLASS_REMARK] = self.cls
        _write(folder, self.config, self.tensors, metadata)
        return len(self.tensors)


def _reference(
    pretrained: Pretrained, name: str, stm: torch.Tensor | None, list_experts: bool
) -> ReferenceModule:
    component = getattr(pretrained.model, name)
    reference = reference_of(component, pretrained.model.config, stm)
    if isinstance(component, Decoder) and list_experts:
        reference.entries = decoder_entries(component, list_experts=True)
        reference.config["use_vectorized_moe"] = False
    return reference


def _table_aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of the rotary tables that are not stored -> those that are."""
    stored = {key.rpartition(".")[2]: key for key in tensors if ".rope." in key}
    places = [match[1] for key in tensors if (match := _ROTATED.fullmatch(key))]
    names = {f"{place}.rope.{kind}": key for place in places for kind, key in stored.items()}
    return {name: key for name, key in names.items() if name != key}


def _variant_remarks(config: ModelConfig) -> list[str]:
    """What to know of the memory attention inside a full model; ConfigError when it cannot be told there.

    The published full model builds the self-interlayer network for the interlayer one.
    """
    variant, gate = config.memory_attention.variant, config.memory_attention.gate
    if variant == "interlayer" and gate.type == "off":
        raise ConfigError(
            "--components: the published full model has no interlayer memory attention without gates; valid: "
            "the components by themselves"
        )
    if variant in ("self_interlayer", "grouped_self_interlayer"):
        return []
    return [f"note: the published full model builds no {variant} memory attention; the components are read"]


def _write_full(folder: Path, parts: Mapping[str, _Part], config: ModelConfig) -> int:
    """The full model: every component under its prefix, the embedding and the memory under both names."""
    variants = {cls: name for name, cls in VARIANT_CLASSES.items()}
    known = config.special_tokens
    ids: dict[str, int] = {} if known == "auto" else known.model_dump()
    description: dict[str, Any] = {f"{name}_config": parts[name].config for name in FULL_MODEL}
    description["memory_attention_variant"] = variants[parts["memory_attention"].cls]
    description["tokenizer_config"] = {
        f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "answer", "query", "pad")
    }
    description["tokenizer"] = None
    tensors = {f"{name}.{key}": value for name in FULL_MODEL for key, value in parts[name].tensors.items()}
    aliases = {
        f"{name}.{dropped}": f"{name}.{kept}"
        for name in FULL_MODEL
        for dropped, kept in parts[name].aliases.items()
    }
    _write(folder, description, tensors, aliases)
    return len(tensors)


def _write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    write_tensors(folder / TENSOR_FILE, tensors, metadata)
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
