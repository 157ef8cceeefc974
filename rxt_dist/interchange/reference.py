"""Load published components and run them the way they were published.

A published model computes on padded [B, T] batches. ``forward_padded`` lays out all T positions as real
tokens and expresses the padding as an explicit key mask; training never does this.

Shape legend: B sequences, T positions, D embedding width, L layers, S memory slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.config.problems import explain
from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.config import (
    COMPONENT_DEFAULTS,
    DECODER_DEFAULTS,
    ENCODER_DEFAULTS,
    SECTIONS,
    Shapes,
    decoder_config,
    encoder_config,
    mlm_head_config,
    published,
    with_defaults,
)
from rxt_dist.interchange.mapping import (
    Entry,
    Form,
    collect,
    decoder_entries,
    encoder_entries,
    load_entries,
    mlm_head_entries,
)
from rxt_dist.interchange.memory import (
    VARIANTS,
    memory_attention_config,
    memory_attention_entries,
    memory_defaults,
)
from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.model import (
    Decoder,
    DecoderOutput,
    Encoder,
    Memory,
    MemoryAttention,
    MLMHead,
    SequenceLayout,
)
from rxt_dist.model.canonical import named_tensors

STM_KEY = "model.stm.memory"


class ReferenceModule(nn.Module):
    """A published component: our module, and how it is called and stored in the published format.

    Attributes:
        module: our component.
        cls: published class name; config: published constructor arguments.
        model_config: a model with this component; what the component does not know is filled in.
        entries: which part of which of our tensors each published tensor is.
        forms: how the tensors of a checkpoint were stored, by published name, in the order of the checkpoint;
            empty for a component that was not loaded from one.
        kept: stored tensors that are no parameter, by published name: rotary tables and the memory.
    """

    def __init__(
        self,
        module: nn.Module,
        cls: str,
        config: Mapping[str, Any],
        model_config: ModelConfig,
        entries: list[Entry],
        kept: Mapping[str, torch.Tensor],
        forms: Mapping[str, Form],
    ) -> None:
        super().__init__()
        self.module = module
        self.cls, self.config, self.model_config = cls, dict(config), model_config
        self.entries, self.kept, self.forms = entries, dict(kept), dict(forms)

    @property
    def stored_stm(self) -> torch.Tensor | None:
        """The memory in the checkpoint as [L, B, S, D], if there is one."""
        stm = self.kept.get(STM_KEY)
        return None if stm is None else as_lanes(stm)

    def reference_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters and buffers in the published layout, by published name."""
        return collect(self.entries, named_tensors(self.module))

    def reference_gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the gradients in the published layout, for parameters that have one."""
        grads = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        return collect([entry for entry in self.entries if entry.name in grads], grads)

    def memory_lanes(self, stm: torch.Tensor | None, batch: int) -> torch.Tensor:
        """``stm``, or the stored memory where that is None, as [L, B, S, D] of 1 or ``batch`` lanes.

        Args:
            stm: [L, S, D] or [L, 1, S, D], read by all sequences, or [L, ``batch``, S, D].

        Raises:
            CheckpointError: there is no memory here and none in the checkpoint.
            ValueError: ``stm`` has another shape.
        """
        memory = self.stored_stm if stm is None else stm
        if memory is None:
            raise CheckpointError(
                f"{STM_KEY}: missing from the checkpoint; pass a memory of shape [L, B, S, D]"
            )
        config, lanes = self.model_config, as_lanes(memory)
        layers, width = config.decoder.num_layers, config.embed_dim
        fits = lanes.dim() == 4 and lanes.shape[0] == layers and lanes.shape[3] == width
        if not fits or lanes.shape[1] not in (1, batch):
            valid = f"({layers}, {batch} or 1, slots, {width}) or ({layers}, slots, {width})"
            raise ValueError(f"stm: found shape {tuple(memory.shape)}; expected {valid}")
        return lanes


def as_lanes(stm: torch.Tensor) -> torch.Tensor:
    """[L, S, D], one memory for all, -> [L, 1, S, D]; others as they are."""
    return stm.unsqueeze(1) if stm.dim() == 3 else stm


class ReferenceDecoder(ReferenceModule):
    """A published decoder."""

    module: Decoder

    def run_padded(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stm: torch.Tensor | None = None,
    ) -> DecoderOutput:
        """As :meth:`forward_padded`, but the hidden states [B * T, D] and the balance sum."""
        batch, length = input_ids.shape
        layout = SequenceLayout.from_lengths([length] * batch, input_ids.device)
        # The memory is fp32 in every precision; what reads it wants it in its own.
        lanes = self.memory_lanes(stm, batch).to(self.module.embedding.weight)
        memory = Memory.of_stm(lanes, layout)
        with _zero_queries(self.module, attention_mask):
            output: DecoderOutput = self.module(input_ids.flatten(), layout, memory)
        return output

    def forward_padded(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stm: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V].

        Args:
            input_ids: int64 [B, T]; attention_mask: [B, T], nonzero where a token is real (right padding;
                causal attention needs no key mask, padded rows only read the memory with zero queries).
            stm: [L, B, S, D], [L, 1, S, D] or [L, S, D]; the checkpoint's own when None.

        Raises:
            CheckpointError: no ``stm`` here and none in the checkpoint.
            ValueError: ``stm`` has another shape.
        """
        hidden = self.run_padded(input_ids, attention_mask, stm).hidden
        logits: torch.Tensor = self.module.lm_head(hidden).unflatten(0, input_ids.shape)
        return logits


class ReferenceEncoder(ReferenceModule):
    """A published encoder."""

    module: Encoder

    def forward_padded(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stm: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(last hidden [B, T, D], all layers [L, B, T, D]); keys with ``attention_mask`` 0 are not seen.

        Args:
            input_ids: int64 [B, T]; attention_mask: [B, T], nonzero where a token is real; None for all.
            stm: [L, B, S, D], [L, 1, S, D] or [L, S, D], a memory to read. None: an encoder with
                ``reads_memory`` reads the checkpoint's own, and all others none.

        Raises:
            CheckpointError: the encoder has no memory cross-attention, or should read a memory of its own
                that the checkpoint does not have.
            ValueError: ``stm`` has another shape.
        """
        layout = _layout_of_all_positions(input_ids.shape, input_ids.device, attention_mask)
        memory = None
        part = self.model_config.encoder
        if stm is not None or part.reads_memory:
            if part.memory_cross_attention is None:
                raise CheckpointError(
                    "config: skip_memory_cross_attention is True, and a memory was passed; valid: stm=None"
                )
            lanes = self.memory_lanes(stm, input_ids.shape[0]).to(self.module.embedding.weight)
            memory = Memory.of_stm(lanes, layout)
        with _zero_queries(self.module, attention_mask):
            flat = self.module(input_ids.flatten(), layout, memory)
        layers: torch.Tensor = flat.unflatten(1, input_ids.shape)
        return layers[-1], layers


class ReferenceMLMHead(ReferenceModule):
    """A published MLM head."""

    module: MLMHead

    def forward_padded(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, D] -> logits [B, T, V]."""
        return nn.functional.linear(self.module(hidden), self.module.weight, self.module.bias)


class ReferenceMemoryAttention(ReferenceModule):
    """A published memory attention."""

    module: MemoryAttention

    def forward_padded(
        self,
        encoded: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stm: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The new memory [L, B, S, D].

        Args:
            encoded: [L, B, T, D]; attention_mask: [B, T], nonzero where a token is real; None for all.
            stm: the memory before, [L, B, S, D], [L, 1, S, D] or [L, S, D]; the checkpoint's own when None.

        Raises:
            CheckpointError: no ``stm`` here and none in the checkpoint.
            ValueError: ``stm`` or ``encoded`` has another shape.
        """
        batch = encoded.shape[1]
        layout = _layout_of_all_positions(encoded.shape[1:3], encoded.device, attention_mask)
        before = self.memory_lanes(stm, batch).to(encoded.device).expand(-1, batch, -1, -1)
        updated: torch.Tensor = self.module(before, encoded.flatten(1, 2), layout)
        return updated


def load_reference(
    cls: str, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> ReferenceModule:
    """Build a published component and fill it.

    Args:
        cls: published class name, with or without its module path.
        config: published constructor arguments; unknown keys are ignored with a warning.
        state_dict: published tensors. Rotary tables have no effect; they and a stored memory are kept aside.

    Raises:
        CheckpointError: unknown class, impossible configuration, or a missing, extra or misshaped tensor.
    """
    name = check_class(cls)
    return LOADERS[name](name, config, state_dict)


def check_class(cls: str) -> str:
    """The published class name without its module path.

    Raises:
        CheckpointError: it is unknown.
    """
    name = cls.rpartition(".")[2]
    if name not in LOADERS:
        raise CheckpointError(f"class {cls!r} cannot be loaded; valid: {', '.join(LOADERS)}")
    return name


State = Mapping[str, torch.Tensor]


def _load_decoder(cls: str, config: Mapping[str, Any], state: State) -> ReferenceDecoder:
    defaults = {**COMPONENT_DEFAULTS, **DECODER_DEFAULTS}
    if cls in LEGACY_CLASSES:
        # Decoders of this name without a norm of the memory are from before tokens read all of it.
        causal = "model.layers.0.stm_norm.weight" not in state
        defaults.update(LEGACY_DEFAULTS, causal_cross=causal)
    values = with_defaults(cls, config, defaults)
    model_config = _translate(decoder_config, values, state)
    decoder = Decoder(model_config)
    entries = decoder_entries(decoder, list_experts=not values["use_vectorized_moe"])
    return _filled(ReferenceDecoder, decoder, cls, config, model_config, entries, state)


def _load_encoder(cls: str, config: Mapping[str, Any], state: State) -> ReferenceEncoder:
    defaults = {**COMPONENT_DEFAULTS, **ENCODER_DEFAULTS}
    if cls in LEGACY_CLASSES:
        reads = STM_KEY in state and "model.layers.0.memory_cross_attention.q_proj.weight" in state
        defaults.update(LEGACY_DEFAULTS, reads_memory=reads)
    values = with_defaults(cls, config, defaults)
    model_config = _translate(encoder_config, values, state)
    encoder = Encoder(model_config).requires_grad_(True)
    return _filled(ReferenceEncoder, encoder, cls, config, model_config, encoder_entries(encoder), state)


def _load_mlm_head(cls: str, config: Mapping[str, Any], state: State) -> ReferenceMLMHead:
    key = "decoder.weight"
    if key not in state or state[key].dim() != 2:
        raise CheckpointError(
            f"{key}: missing from the checkpoint; expected a tensor of shape (vocabulary, width)"
        )
    vocab, width = state[key].shape
    values = with_defaults(cls, config, {"embed_dim": width, "vocab_size": vocab})
    model_config = _valid(lambda: mlm_head_config(values["embed_dim"], values["vocab_size"]))
    head = MLMHead(model_config)
    return _filled(ReferenceMLMHead, head, cls, config, model_config, mlm_head_entries(head), state)


def _load_memory_attention(cls: str, config: Mapping[str, Any], state: State) -> ReferenceMemoryAttention:
    variant = VARIANTS[cls]
    defaults = memory_defaults(variant)
    if cls in LEGACY_CLASSES:
        defaults.update(LEGACY_DEFAULTS, norm_type="rms", input_norm=False)
    values = with_defaults(cls, config, defaults)
    model_config = _translate(partial(memory_attention_config, variant), values, state)
    module = MemoryAttention(model_config)
    entries = memory_attention_entries(module)
    return _filled(ReferenceMemoryAttention, module, cls, config, model_config, entries, state)


LOADERS: dict[str, Callable[[str, Mapping[str, Any], State], ReferenceModule]] = {
    "RxTDecoder": _load_decoder,
    "RxTEncoder": _load_encoder,
    "MLMHead": _load_mlm_head,
    "RxTAlphaDecoder": _load_decoder,
    "RxTAlphaEncoder": _load_encoder,
    **dict.fromkeys(VARIANTS, _load_memory_attention),
}
LEGACY_CLASSES = frozenset({"RxTAlphaDecoder", "RxTAlphaEncoder", "RxTAlphaMemoryAttention"})
LEGACY_DEFAULTS = {"rope_layout": "halves"}

Kind = TypeVar("Kind", bound=ReferenceModule)


def _filled(
    kind: type[Kind],
    module: nn.Module,
    cls: str,
    config: Mapping[str, Any],
    model_config: ModelConfig,
    entries: list[Entry],
    state: State,
) -> Kind:
    """``module`` with the tensors of ``state``, as a ``kind``."""
    others = {key for key in state if key == STM_KEY or ".rope." in key}
    forms = load_entries(module, entries, state, others)
    kept = {key: state[key].detach().clone() for key in others}
    if STM_KEY in kept:
        check_stored_stm(kept[STM_KEY], model_config)
    in_order = {key: forms.get(key) or Form(kept[key].shape, kept[key].dtype) for key in state}
    return kind(module, cls, config, model_config, entries, kept, in_order)


def check_stored_stm(stm: torch.Tensor, config: ModelConfig) -> None:
    """Refuse a stored memory that is not [L, B, S, D] or [L, S, D] of ``config``.

    Raises:
        CheckpointError: the key, the shape found and the shape expected.
    """
    found = tuple(stm.shape)
    layers, slots, width = config.decoder.num_layers, config.stm_size, config.embed_dim
    expected = (layers, slots, width) if len(found) == 3 else (layers, *found[1:2], slots, width)
    if found != expected:
        raise CheckpointError(f"{STM_KEY}: found shape {found}; expected {expected}")


def _translate(
    translate: Callable[[Mapping[str, Any], Shapes], ModelConfig], values: Mapping[str, Any], state: State
) -> ModelConfig:
    return _valid(lambda: translate(values, Shapes(state)))


def _valid(make: Callable[[], ModelConfig]) -> ModelConfig:
    try:
        return make()
    except ValidationError as error:
        # What is filled in around a component repeats its problems under other names.
        section, prefix = SECTIONS.get(error.title, (ModelConfig, ""))
        problems = [published(problem) for problem in explain(error, section, prefix)]
        details = "; ".join(dict.fromkeys(str(problem) for problem in problems))
        raise CheckpointError(f"config: the published configuration is not possible: {details}") from error


def _layout_of_all_positions(
    shape: torch.Size, device: torch.device, attention_mask: torch.Tensor | None
) -> SequenceLayout:
    """All positions of ``shape`` (B, T) as tokens; keys with ``attention_mask`` [B, T] 0 are not seen."""
    layout = SequenceLayout.from_lengths([shape[1]] * shape[0], device)
    if attention_mask is None:
        return layout
    return replace(layout, attention=_masked_keys(layout, attention_mask))


def _masked_keys(layout: SequenceLayout, attention_mask: torch.Tensor) -> AttentionLayout:
    """Self-attention of all positions to the positions whose mask is nonzero."""
    real = attention_mask != 0
    counts = real.sum(dim=1)
    cu_k = torch.zeros_like(layout.cu_seqlens)
    cu_k[1:] = counts.cumsum(0)
    index = real.flatten().nonzero().squeeze(1)
    return AttentionLayout(layout.cu_seqlens, cu_k, layout.max_seqlen, int(counts.max()), index)


@contextmanager
def _zero_queries(component: Decoder | Encoder, attention_mask: torch.Tensor | None) -> Iterator[None]:
    """Zero the cross-attention input of padded rows, as the published forward pass does.

    Real rows are untouched; padded ones matter because the router and its balance loss see them.
    """
    if attention_mask is None:
        yield
        return
    mask = (attention_mask != 0).flatten()[:, None]
    norms = [norm for layer in component.layers if isinstance(norm := layer.cross_norm, nn.Module)]
    hooks = [
        norm.register_forward_hook(lambda module, inputs, out: (out[0], out[1] * mask)) for norm in norms
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
