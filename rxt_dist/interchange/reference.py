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
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.config import (
    COMPONENT_DEFAULTS,
    DECODER_DEFAULTS,
    ENCODER_DEFAULTS,
    decoder_config,
    encoder_config,
    mlm_head_config,
    with_defaults,
)
from rxt_dist.interchange.mapping import (
    Entry,
    collect,
    decoder_entries,
    encoder_entries,
    load_entries,
    mlm_head_entries,
    named_tensors,
)
from rxt_dist.interchange.memory import (
    MEMORY_DEFAULTS,
    VARIANTS,
    memory_attention_config,
    memory_attention_entries,
    reshape_numbers,
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

STM_KEY = "model.stm.memory"


class ReferenceModule(nn.Module):
    """A published component: our module, and how its parameters are called in the checkpoint."""

    def __init__(self, module: nn.Module, entries: list[Entry]) -> None:
        super().__init__()
        self.module = module
        self.entries = entries

    def reference_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters and buffers in the published layout, by published name."""
        return collect(self.entries, named_tensors(self.module))

    def reference_gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the gradients in the published layout, for parameters that have one."""
        grads = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        return collect([entry for entry in self.entries if entry.name in grads], grads)


class ReferenceDecoder(ReferenceModule):
    """A published decoder; ``stored_stm`` [L, B, S, D] is the memory in its checkpoint, if any."""

    module: Decoder

    def __init__(self, module: Decoder, entries: list[Entry], stored_stm: torch.Tensor | None) -> None:
        super().__init__(module, entries)
        self.stored_stm = stored_stm

    def run_padded(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stm: torch.Tensor | None = None,
    ) -> DecoderOutput:
        """As :meth:`forward_padded`, but the hidden states [B * T, D] and the balance sum."""
        batch, length = input_ids.shape
        layout = SequenceLayout.from_lengths([length] * batch, input_ids.device)
        memory = self.stored_stm if stm is None else stm
        if memory is None:
            raise CheckpointError(
                f"{STM_KEY}: missing from the checkpoint; pass a memory of shape [L, B, S, D]"
            )
        with _zero_queries(self.module, attention_mask):
            output: DecoderOutput = self.module(input_ids.flatten(), layout, Memory.of_stm(memory, layout))
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
            stm: [L, B, S, D] or [L, 1, S, D]; the checkpoint's own when None.

        Raises:
            CheckpointError: no ``stm`` here and none in the checkpoint.
        """
        hidden = self.run_padded(input_ids, attention_mask, stm).hidden
        logits: torch.Tensor = self.module.lm_head(hidden).unflatten(0, input_ids.shape)
        return logits


class ReferenceEncoder(ReferenceModule):
    """A published encoder."""

    module: Encoder

    def forward_padded(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(last hidden [B, T, D], all layers [L, B, T, D]); keys with ``attention_mask`` 0 are not seen."""
        layout = _layout_of_all_positions(input_ids.shape, input_ids.device, attention_mask)
        layers: torch.Tensor = self.module(input_ids.flatten(), layout).unflatten(1, input_ids.shape)
        return layers[-1], layers


class ReferenceMLMHead(ReferenceModule):
    """A published MLM head."""

    module: MLMHead

    def forward_padded(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, D] -> logits [B, T, V]."""
        return nn.functional.linear(self.module(hidden), self.module.weight, self.module.bias)


class ReferenceMemoryAttention(ReferenceModule):
    """A published memory attention; ``stored_stm`` [L, B, S, D] is the memory in its checkpoint, if any."""

    module: MemoryAttention

    def __init__(
        self, module: MemoryAttention, entries: list[Entry], stored_stm: torch.Tensor | None
    ) -> None:
        super().__init__(module, entries)
        self.stored_stm = stored_stm

    def forward_padded(
        self, encoded: torch.Tensor, attention_mask: torch.Tensor | None, stm: torch.Tensor
    ) -> torch.Tensor:
        """The new memory [L, B, S, D].

        Args:
            encoded: [L, B, T, D]; attention_mask: [B, T], nonzero where a token is real; None for all.
            stm: [L, B, S, D], the memory before.
        """
        layout = _layout_of_all_positions(encoded.shape[1:3], encoded.device, attention_mask)
        updated: torch.Tensor = self.module(stm, encoded.flatten(1, 2), layout)
        return updated


def load_reference(
    cls: str, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> ReferenceModule:
    """Build a published component and fill it.

    Args:
        cls: published class name, with or without its module path.
        config: published constructor arguments; unknown keys are ignored with a warning.
        state_dict: published tensors. Rotary tables are ignored, a stored memory is kept aside.

    Raises:
        CheckpointError: unknown class, impossible configuration, or a missing, extra or misshaped tensor.
    """
    name = cls.rpartition(".")[2]
    if name not in LOADERS:
        raise CheckpointError(f"class {cls!r} cannot be loaded; valid: {', '.join(LOADERS)}")
    return LOADERS[name](config, state_dict)


def _load_decoder(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> ReferenceDecoder:
    values = with_defaults("RxTDecoder", config, {**COMPONENT_DEFAULTS, **DECODER_DEFAULTS})
    decoder = Decoder(_translate(decoder_config, values, state))
    entries = decoder_entries(decoder, list_experts=not values["use_vectorized_moe"])
    load_entries(decoder, entries, state, _ignored(state))
    return ReferenceDecoder(decoder, entries, _stored_stm(state))


def _load_encoder(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> ReferenceEncoder:
    values = with_defaults("RxTEncoder", config, {**COMPONENT_DEFAULTS, **ENCODER_DEFAULTS})
    encoder = Encoder(_translate(encoder_config, values, state))
    entries = encoder_entries(encoder)
    unused = {key for key in state if ".stm_norm." in key}  # norms of a memory that the encoder never reads
    load_entries(encoder, entries, state, _ignored(state) | unused)
    return ReferenceEncoder(encoder, entries)


def _load_mlm_head(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> ReferenceMLMHead:
    with_defaults("MLMHead", config, {"embed_dim": None, "vocab_size": None})
    key = "decoder.weight"
    if key not in state or state[key].dim() != 2:
        raise CheckpointError(
            f"{key}: missing from the checkpoint; expected a tensor of shape (vocabulary, width)"
        )
    vocab, width = state[key].shape
    head = MLMHead(mlm_head_config(config.get("embed_dim", width), config.get("vocab_size", vocab)))
    entries = mlm_head_entries(head)
    load_entries(head, entries, state, set())
    return ReferenceMLMHead(head, entries)


def _load_memory_attention(
    cls: str, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> ReferenceMemoryAttention:
    values = with_defaults(cls, config, {**COMPONENT_DEFAULTS, **MEMORY_DEFAULTS})
    module = MemoryAttention(_translate(partial(memory_attention_config, VARIANTS[cls]), values, state))
    entries = memory_attention_entries(module)
    load_entries(module, entries, reshape_numbers(module, entries, state), _ignored(state))
    return ReferenceMemoryAttention(module, entries, _stored_stm(state))


LOADERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, torch.Tensor]], ReferenceModule]] = {
    "RxTDecoder": _load_decoder,
    "RxTEncoder": _load_encoder,
    "MLMHead": _load_mlm_head,
    **{cls: partial(_load_memory_attention, cls) for cls in VARIANTS},
}


def _translate(
    translate: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], ModelConfig],
    values: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
) -> ModelConfig:
    try:
        return translate(values, {key: tuple(tensor.shape) for key, tensor in state.items()})
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"config: the published configuration is not possible: {details}") from error


def _ignored(state: Mapping[str, torch.Tensor]) -> set[str]:
    """Stored tensors that are no parameters: rotary tables (recomputed) and the memory."""
    return {key for key in state if key == STM_KEY or ".rope." in key}


def _stored_stm(state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    stm = state.get(STM_KEY)
    if stm is None:
        return None
    if stm.dim() not in (3, 4):
        raise CheckpointError(
            f"{STM_KEY}: found shape {tuple(stm.shape)}; expected [L, B, S, D] or [L, S, D]"
        )
    return stm.unsqueeze(1) if stm.dim() == 3 else stm


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
def _zero_queries(decoder: Decoder, attention_mask: torch.Tensor | None) -> Iterator[None]:
    """Zero the cross-attention input of padded rows, as the published forward pass does.

    Real rows are untouched; padded ones matter because the router and its balance loss see them.
    """
    if attention_mask is None:
        yield
        return
    mask = (attention_mask != 0).flatten()[:, None]
    norms = [norm for layer in decoder.layers if isinstance(norm := layer.cross_norm, nn.Module)]
    hooks = [norm.register_forward_hook(lambda module, inputs, output: output * mask) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
