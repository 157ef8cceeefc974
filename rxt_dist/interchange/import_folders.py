"""Published folders -> one native folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.config.model import SpecialTokens
from rxt_dist.config.problems import explain
from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.export import convert_rope_layout
from rxt_dist.interchange.native import COMPONENTS, write_native
from rxt_dist.interchange.pretrained import widest
from rxt_dist.interchange.published import (
    Published,
    PublishedFolder,
    View,
    check_applied,
    read_published,
)
from rxt_dist.interchange.reference import (
    LEGACY_CLASSES,
    STM_KEY,
    ReferenceModule,
    load_reference,
)
from rxt_dist.interchange.tokenizer import import_tokenizer, special_tokens
from rxt_dist.model import RxTModel
from rxt_dist.model.canonical import named_tensors

RopeLayout = Literal["interleaved", "halves"]

# Components by how much of a model their configuration tells.
_KNOWLEDGE = ("decoder", "encoder", "memory_attention", "mlm_head")
_CROSS = "model.layers.0.memory_cross_attention"


@dataclass(frozen=True)
class ImportOptions:
    """What the files do not say.

    Attributes:
        rope_layout: of the stored weights; None: as the configuration or the class says, else interleaved.
        tokenizer: file or folder; None: the ``tokenizer.json`` beside the weights, if there is one.
        tokens: ids of special tokens, by the fields of SpecialTokens.
        classes: published class names, each for the component of its kind.
        embedding: whose table is kept where encoder and decoder have different ones; None: refuse those.
        drop_stm: whether a stored memory is left behind.
    """

    rope_layout: RopeLayout | None = None
    tokenizer: Path | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    classes: Sequence[str] = ()
    embedding: Literal["encoder", "decoder"] | None = None
    drop_stm: bool = False


@dataclass(frozen=True, eq=False)
class _Part:
    """A loaded component and where it came from."""

    published: Published
    reference: ReferenceModule

    @property
    def source(self) -> str:
        return self.published.source

    @property
    def config(self) -> ModelConfig:
        return self.reference.model_config


_Parts = dict[str, _Part]


def import_published(paths: Sequence[Path], output: Path, options: ImportOptions) -> list[str]:
    """Join the components in the published folders ``paths`` and write them as the native folder ``output``.

    Returns:
        The lines of a report.

    Raises:
        CheckpointError: a folder is damaged or of an unknown kind, components do not fit together, the
            tokenizer does not fit them, or ``output`` is in the way.
        ConfigError: an option is not valid for these folders.
    """
    folders = [folder for path in paths for folder in read_published(path, options.classes)]
    report: list[str] = []
    parts = _load(folders, options, report)
    config = _join(parts, folders[0].path.resolve().name, report)
    tokenizer = _tokenizer(folders, parts, options, config, report)
    source = str(folders[0].path)
    configured = {name: token for folder in folders for name, token in folder.special_tokens.items()}
    tokens = special_tokens(options.tokens, tokenizer, configured, source)
    resolved: dict[str, Any] = {"special_tokens": tokens or "auto"}
    if tokenizer is not None:  # a memory attention by itself has no vocabulary of its own
        resolved["vocab_size"] = tokenizer.get_vocab_size()
    config = _validated(config.model_copy(update=resolved), source)
    report.append(_tokens_line(tokens, {*configured, *options.tokens}, tokenizer))
    model = _assemble(parts, config, options, report)
    stm = _stored_stm(parts, report)
    decoder = parts.get("decoder")
    lists = decoder is not None and any(".experts.0." in key for key in decoder.reference.forms)
    write_native(output, model, set(parts), tokenizer, stm, list_experts=lists)
    return [*report, f"written to {output}"]


def _load(folders: Sequence[PublishedFolder], options: ImportOptions, report: list[str]) -> _Parts:
    parts: _Parts = {}
    check_applied(options.classes, [published for folder in folders for published in folder.parts])
    for published in (published for folder in folders for published in folder.parts):
        if published.component in parts:
            first = parts[published.component].source
            raise CheckpointError(
                f"{first} and {published.source} both hold a {published.component}; give one"
            )
        reference = _load_component(published, options, report)
        parts[published.component] = _Part(published, reference)
    return {name: parts[name] for name in COMPONENTS if name in parts}


def _load_component(published: Published, options: ImportOptions, report: list[str]) -> ReferenceModule:
    """One component in interleaved layout, every tensor in the dtype in which it was stored."""
    # An encoder never owns a memory: what is stored with it is the decoder's, or was never read.
    own = published.component != "encoder" and not options.drop_stm
    left_out = set() if own else {STM_KEY} & set(published.tensors)
    tensors: Mapping[str, torch.Tensor] = View(published.tensors, "", left_out)
    config = dict(published.config)
    layout = _stored_layout(published, options)
    if published.component != "mlm_head":
        config["rope_layout"] = layout
    if layout == "halves":
        tensors, config["rope_layout"] = _Interleaved(tensors, published), "interleaved"
    if published.cls == "RxTAlphaEncoder" and left_out:
        config.setdefault("reads_memory", f"{_CROSS}.q_proj.weight" in tensors)
    try:
        weights = [name for name in tensors if name != STM_KEY and ".rope." not in name]
        with _modules_of(widest(tensors[name].dtype for name in weights)):
            reference = load_reference(published.cls, config, tensors)
    except CheckpointError as error:
        hint = "; --drop-stm leaves the stored memory behind" if str(error).startswith(STM_KEY) else ""
        raise CheckpointError(f"{published.source}: {error}{hint}") from error
    widened = _cast(reference)
    count = sum(p.numel() for p in reference.module.parameters())
    dtypes = sorted({str(form.dtype).removeprefix("torch.") for form in reference.forms.values()})
    report.append(
        f"{published.component}: {published.cls} from {published.source}, {len(reference.entries)} tensors, "
        f"{count} parameters, {' and '.join(dtypes)}"
    )
    report += [f"  {line}" for line in _remarks(published, reference, layout, left_out, widened)]
    return reference


def _stored_layout(published: Published, options: ImportOptions) -> str:
    legacy = "halves" if published.cls in LEGACY_CLASSES else "interleaved"
    return options.rope_layout or str(published.config.get("rope_layout", legacy))


@contextmanager
def _modules_of(dtype: torch.dtype) -> Iterator[None]:
    """Make modules in ``dtype``: in fp32, bf16 weights would need twice their size for a moment."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Interleaved(View):
    """Tensors stored in halves, each converted when it is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], published: Published) -> None:
        super().__init__(tensors, "")
        self._published = published

    def __getitem__(self, name: str) -> torch.Tensor:
        one = {name: super().__getitem__(name)}
        return convert_rope_layout(one, self._published.cls, self._published.config, "interleaved")[name]


def _cast(reference: ReferenceModule) -> list[str]:
    """Give parameters and buffers the dtype of what was stored; returns the tensors that this widened."""
    made_of: dict[str, list[str]] = {}
    for entry in reference.entries:
        made_of.setdefault(entry.name, []).append(entry.key)
    widened = []
    for name, tensor in named_tensors(reference.module).items():
        stored = {key: reference.forms[key].dtype for key in made_of[name]}
        dtype = widest(stored.values())
        tensor.data = tensor.data.to(dtype)
        widened += [key for key, found in stored.items() if found != dtype]
    return widened


def _remarks(
    published: Published, reference: ReferenceModule, layout: str, left_out: set[str], widened: list[str]
) -> Iterator[str]:
    """What was done with a component, and what looks as if an option were missing."""
    tables = sum(".rope." in name for name in published.tensors)
    if tables:
        yield f"{tables} rotary tables ignored, they are computed"
    if STM_KEY in left_out & set(published.tensors):
        yield "stored memory left behind"
    if widened:
        yield f"{len(widened)} tensors widened to the dtype of those they are stored with ({widened[0]}, ...)"
    if layout == "halves":
        yield "rotary layout converted from halves to interleaved"
    stm = reference.kept.get(STM_KEY)
    part = reference.model_config.decoder
    old_form = stm is not None and stm.dim() == 3
    old_norm = published.component == "decoder" and not part.stm_norm
    if layout != "halves" and (old_form or old_norm):
        what = "the memory is stored as [L, S, D]" if old_form else "the memory has no norm"
        yield f"note: {what}, as in releases whose rotary layout is halves; if so give --rope-layout halves"
    if old_norm and not part.causal_cross:
        yield "note: the oldest decoders read the memory causally; if so give --class RxTAlphaDecoder"


def _join(parts: _Parts, name: str, report: list[str]) -> ModelConfig:
    """The model of all ``parts``; CheckpointError naming two of them where they contradict each other."""
    base = min(parts.items(), key=lambda item: _KNOWLEDGE.index(item[0]))[1].config
    shared: dict[str, Any] = {"name": name}
    for setting, values in _settings(parts).items():
        (first, value), *others = values
        for other, found in others:
            if found != value:
                raise CheckpointError(
                    f"{first.source} has {setting} {value}, {other.source} has {found}; a model has one"
                )
        shared[setting] = value
    lengths = {part.config.seq_len for name, part in parts.items() if name != "mlm_head"}
    if len(lengths) > 1:
        report.append(f"seq_len: {min(lengths)}, the least of {', '.join(map(str, sorted(lengths)))}")
    shared["seq_len"] = min(lengths, default=base.seq_len)
    shared.pop("num_layers", None)
    sections = {name: getattr(part.config, name) for name, part in parts.items() if name != "mlm_head"}
    joined = base.model_copy(update={**shared, **sections})
    return _validated(joined, " and ".join(part.source for part in parts.values()))


def _settings(parts: _Parts) -> dict[str, list[tuple[_Part, Any]]]:
    """What several components know of the model: setting -> (component, value) of each that knows it."""
    known: dict[str, list[tuple[_Part, Any]]] = {}
    for name, part in parts.items():
        config = part.config
        values: dict[str, Any] = {"embed_dim": config.embed_dim}
        if name != "memory_attention":
            values["vocab_size"] = config.vocab_size
        if name != "mlm_head":
            values["num_layers"] = config.decoder.num_layers
            values["rope_angle_dtype"] = config.rope_angle_dtype
            section = getattr(config, name)
            if getattr(section, "use_rope", True):
                values["rope_base"] = config.rope_base
        if name in ("encoder", "decoder"):
            values["norm"] = config.norm
        if name in ("decoder", "memory_attention"):
            values["stm_size"] = config.stm_size
        for setting, value in values.items():
            known.setdefault(setting, []).append((part, value))
    return known


def _validated(config: ModelConfig, source: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(config.model_dump())
    except ValidationError as error:
        problem = explain(error, ModelConfig)[0]
        raise CheckpointError(f"{source}: the components do not make one model: {problem}") from error


def _tokenizer(
    folders: Sequence[PublishedFolder],
    parts: _Parts,
    options: ImportOptions,
    config: ModelConfig,
    report: list[str],
) -> Tokenizer | None:
    """The tokenizer that was given, or the one that all folders with a tokenizer share."""
    files = [folder.tokenizer for folder in folders if folder.tokenizer is not None]
    given = options.tokenizer
    if given is None and not files:
        return None
    size = None if set(parts) == {"memory_attention"} else config.vocab_size
    assert size != "auto"
    tokenizer, done = import_tokenizer(given or files[0], size)
    for other in files[1:] if given is None else ():
        if import_tokenizer(other, size)[0].get_vocab() != tokenizer.get_vocab():
            raise CheckpointError(
                f"{files[0]} and {other} are different tokenizers; say which one with --tokenizer"
            )
    report.append("; ".join([f"tokenizer: {given or files[0]}, {tokenizer.get_vocab_size()} tokens", *done]))
    return tokenizer


def _tokens_line(tokens: SpecialTokens | None, known: set[str], tokenizer: Tokenizer | None) -> str:
    if tokens is None:
        return "special tokens: not known; give --tokenizer or --tokens"
    ids = tokens.model_dump()
    assumed = [] if tokenizer is not None else [name for name in ids if name not in known]
    line = "special tokens: " + ", ".join(f"{name} {token}" for name, token in ids.items())
    return f"{line}; {' and '.join(assumed)} as in published tokenizers" if assumed else line


def _assemble(parts: _Parts, config: ModelConfig, options: ImportOptions, report: list[str]) -> RxTModel:
    """A model of the loaded components; the others stay on the meta device."""
    with torch.device("meta"):
        model = RxTModel(config)
    for name, part in parts.items():
        setattr(model, name, part.reference.module)
    tables = {
        name: parts[name].reference.module.embedding for name in ("encoder", "decoder") if name in parts
    }
    if not tables:
        return model
    chosen = options.embedding or "decoder"
    if len(tables) == 2:
        encoder, decoder = (table.weight for table in tables.values() if isinstance(table, nn.Embedding))
        same = _same_bits(encoder, decoder)
        if not same and options.embedding is None:
            raise CheckpointError(_different_tables(parts))
        report.append(f"embedding: {'the same in encoder and decoder' if same else f'that of the {chosen}'}")
    table = tables.get(chosen) or next(iter(tables.values()))
    model.encoder.embedding = model.decoder.embedding = table  # type: ignore[assignment]
    return model


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype:
        return torch.equal(first.double(), second.double())
    return torch.equal(first.detach().view(torch.uint8), second.detach().view(torch.uint8))


def _different_tables(parts: _Parts) -> str:
    sources = " and ".join(parts[name].source for name in ("encoder", "decoder"))
    return (
        f"{sources} have different embeddings, which a model shares; the published loader leaves a random "
        "table in the encoder of a full model that was saved after sharing: say which one to keep with "
        "--embedding decoder|encoder"
    )


def _stored_stm(parts: _Parts, report: list[str]) -> torch.Tensor | None:
    """The memory [L, B, S, D] stored with the decoder or the memory attention."""
    found = {
        name: stm
        for name in ("decoder", "memory_attention")
        if name in parts and (stm := parts[name].reference.stored_stm) is not None
    }
    if not found:
        if {"decoder", "memory_attention"} & set(parts):
            report.append("memory: none stored, fresh ones are drawn")
        return None
    chosen = next(iter(found))
    stm = found[chosen]
    same = all(torch.equal(stm, other) for other in found.values())
    line = f"memory: stored with the {chosen}"
    if stm.shape[1] != 1:
        line += f", of {stm.shape[1]} conversations: kept for exports, fresh ones are drawn"
    report.append(line if same else f"{line}; that of the memory attention is another and is left behind")
    return stm
