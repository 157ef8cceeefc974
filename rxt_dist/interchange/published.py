"""Published folders: which components they hold, and of which class.

A folder is ``config.json`` (the constructor's arguments), ``model.safetensors`` and perhaps
``tokenizer.json``. It holds one component, or the full model, whose tensors begin with ``encoder.``,
``decoder.`` and ``memory_attention.``. Neither file names a class: the tensors' names do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rxt_dist.data.tokens import TOKENIZER_FILE
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.interchange.files import CONFIG_FILE, TENSOR_FILE, TensorFile, read_json
from rxt_dist.interchange.memory import VARIANTS
from rxt_dist.interchange.native import COMPONENTS, is_native
from rxt_dist.interchange.reference import check_class

FULL_MODEL = ("encoder", "decoder", "memory_attention")
CLASS_REMARK = "class"
"""Key of the tensor file's metadata that names a class which the tensors do not show."""

INTERLAYER = "RxTInterlayerMemoryAttention"
SELF_INTERLAYER = "RxTSelfInterlayerMemoryAttention"
GROUPED = "RxTGroupedSelfInterlayerMemoryAttention"
# Tensors that only one class has.
_TELLING = {
    "model.head.weight": "RxTDecoder",
    "dense.weight": "MLMHead",
    "model.embedding.weight": "RxTEncoder",
}
# Names of the full model's memory_attention_variant.
VARIANT_CLASSES = {
    "simple": "RxTSimpleMemoryAttention",
    "self": "RxTSelfMemoryAttention",
    "interlayer": INTERLAYER,
    "self-interlayer": SELF_INTERLAYER,
    "grouped-self-interlayer": GROUPED,
}


@dataclass(frozen=True, eq=False)
class Published:
    """A component in a published folder.

    Attributes:
        component: of ``COMPONENTS``; cls: published class name.
        config: constructor arguments; tensors: by published name, read when asked for.
        source: how messages call it.
    """

    component: str
    cls: str
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    source: str


@dataclass(frozen=True, eq=False)
class PublishedFolder:
    """What a published folder holds.

    Attributes:
        path: the folder; parts: its components.
        special_tokens: ids that its configuration names, by the fields of SpecialTokens.
    """

    path: Path
    parts: list[Published]
    special_tokens: dict[str, int]

    @property
    def tokenizer(self) -> Path | None:
        file = self.path / TOKENIZER_FILE
        return file if file.is_file() else None


class View(Mapping[str, torch.Tensor]):
    """The tensors of a mapping whose names begin with ``prefix``, without it; read when asked for."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], prefix: str, left_out: Collection[str] = ()
    ) -> None:
        self._tensors, self._prefix = tensors, prefix
        names = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
        self._names = dict.fromkeys(name for name in names if name not in left_out)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_published(path: Path, classes: Sequence[str] = ()) -> list[PublishedFolder]:
    """Open a published folder, or all component folders inside a folder that is none itself.

    Args:
        classes: published class names for components that the tensors do not tell apart, or that have
            older classes; each applies to components of its kind.

    Raises:
        CheckpointError: a file is missing or damaged, or a class is unknown or cannot be told.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder of a published model")
    inside = [path / name for name in COMPONENTS if (path / name / CONFIG_FILE).is_file()]
    if inside and not (path / CONFIG_FILE).exists():
        return [_read_folder(folder, classes) for folder in inside]
    return [_read_folder(path, classes)]


def component_of(cls: str) -> str:
    """The component that a published class is; CheckpointError when it is unknown."""
    name = check_class(cls)
    if name in VARIANTS:
        return "memory_attention"
    return "mlm_head" if name == "MLMHead" else "decoder" if name.endswith("Decoder") else "encoder"


def _read_folder(path: Path, classes: Sequence[str]) -> PublishedFolder:
    if (path / CONFIG_FILE).is_file() and is_native(path):
        raise CheckpointError(f"{path} is a native folder, which needs no import")
    config = read_json(path / CONFIG_FILE)
    file = TensorFile(path / TENSOR_FILE)
    chosen = {component_of(cls): check_class(cls) for cls in classes}
    if "decoder_config" not in config:
        cls = _class_of(file, config, chosen, file.remarks.get(CLASS_REMARK), str(path))
        return PublishedFolder(path, [Published(component_of(cls), cls, config, file, str(path))], {})
    parts = []
    for component in FULL_MODEL:
        source = f"{path} ({component})"
        arguments = config.get(f"{component}_config")
        if not isinstance(arguments, dict):
            raise CheckpointError(
                f"{path / CONFIG_FILE}: {component}_config is missing; it must be an object"
            )
        tensors = View(file, f"{component}.")
        remark = _variant_class(config, tensors, path) if component == "memory_attention" else None
        cls = _class_of(tensors, arguments, chosen, remark, source)
        if component_of(cls) != component:
            raise CheckpointError(f"{source}: found the tensors of {component_of(cls)}")
        parts.append(Published(component, cls, arguments, tensors, source))
    prefixes = tuple(f"{component}." for component in FULL_MODEL)
    extra = next((name for name in file if not name.startswith(prefixes)), None)
    if extra is not None:
        raise CheckpointError(
            f"{file.path}: found {extra}; expected names that begin with {', '.join(prefixes)}"
        )
    return PublishedFolder(path, parts, _special_tokens(config, path))


def _class_of(
    names: Collection[str],
    config: Mapping[str, Any],
    chosen: Mapping[str, str],
    remark: str | None,
    source: str,
) -> str:
    """The class of a component: the user's choice for its kind, the remark, or what the tensors show."""
    candidates, sure = shown_classes(names, config)
    if not candidates:
        raise CheckpointError(
            f"{source}: no component is known by its tensors ({', '.join(sorted(names)[:2]) or 'none'}, ...)"
        )
    component = component_of(candidates[0])
    if component in chosen:
        return chosen[component]
    if remark in candidates:
        return str(remark)
    if sure:
        return candidates[0]
    valid = " or ".join(candidates)
    raise CheckpointError(f"{source}: its class cannot be told from its tensors; give --class {valid}")


def shown_classes(names: Collection[str], config: Mapping[str, Any]) -> tuple[list[str], bool]:
    """(classes whose tensors have these names, whether the first of them is the one if nothing is said)."""
    for name, cls in _TELLING.items():
        if name in names:
            return [cls], True
    places = {name.split(".")[1] for name in names if name.startswith("model.")}
    if "attention_layers" not in places:
        return [], False
    if "memory_input_norm_layers" not in places and config.get("input_norm", True):
        return ["RxTAlphaMemoryAttention"], True
    if "self_attention_layers" in places:
        return ["RxTSelfMemoryAttention"], True
    if "mean_attention_layers" not in places:
        return ["RxTSimpleMemoryAttention"], True
    if "num_groups" in config:
        return [GROUPED], True
    if "interlayer_gate_layers" in places:
        return [SELF_INTERLAYER, GROUPED], True
    # Without gates the networks are stored alike.
    gated = config.get("use_gated_residual", False)
    return ([INTERLAYER], True) if gated else ([INTERLAYER, SELF_INTERLAYER, GROUPED], False)


def _variant_class(config: Mapping[str, Any], names: Collection[str], path: Path) -> str:
    """What the full model calls its memory attention.

    Published full models build the self-interlayer network for ``interlayer`` as well.
    """
    variant = config.get("memory_attention_variant")
    if variant not in VARIANT_CLASSES:
        valid = ", ".join(VARIANT_CLASSES)
        raise CheckpointError(
            f"{path / CONFIG_FILE}: memory_attention_variant is {variant!r}; valid: {valid}"
        )
    return SELF_INTERLAYER if variant == "interlayer" else VARIANT_CLASSES[variant]


def _special_tokens(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Ids that a full model's configuration names, by the fields of SpecialTokens."""
    named = config.get("tokenizer_config") or {}
    found = {}
    for key, value in named.items() if isinstance(named, dict) else ():
        name = str(key).removesuffix("_token_id")
        if name not in ("pad", "bos", "eos", "query", "answer") or value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(
                f"{path / CONFIG_FILE}: tokenizer_config.{key} is {value!r}; valid: the number of a token"
            )
        found[name] = value
    return found


def check_applied(classes: Sequence[str], parts: Sequence[Published]) -> None:
    """Raises ConfigError when one of ``classes`` is of a kind that none of ``parts`` is."""
    for cls in classes:
        if component_of(cls) not in {part.component for part in parts}:
            found = ", ".join(part.component for part in parts)
            raise ConfigError(f"--class {cls}: found no {component_of(cls)}; the folders hold: {found}")
