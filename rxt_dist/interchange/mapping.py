"""Which part of which of our parameters or buffers each published tensor is.

One list of :class:`Entry` serves every direction: reading a checkpoint, writing one, and comparing
gradients, since an entry is a view of our tensor in the published layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from rxt_dist.errors import CheckpointError
from rxt_dist.model import Decoder, Encoder, MLMHead
from rxt_dist.model.attention import CrossAttention, SelfAttention
from rxt_dist.model.canonical import named_tensors
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.layer import Layer
from rxt_dist.model.moe import MoE, SharedExperts


@dataclass(frozen=True)
class Entry:
    """A published tensor as a view of one of our parameters.

    Attributes:
        key: published name; name: our parameter or buffer.
        expert: index along dimension 0 of a stacked parameter, or None.
        rows: (start, size) along dimension 0 (after ``expert``), or None for all.
        transposed: whether the last two dimensions are swapped.
    """

    key: str
    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of our ``tensor`` (parameter, gradient or moment) in the published layout."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.rows is not None:
            tensor = tensor.narrow(0, *self.rows)
        return tensor.transpose(-2, -1) if self.transposed else tensor

    def under(self, key: str, name: str) -> Entry:
        return replace(self, key=f"{key}.{self.key}", name=f"{name}.{self.name}")


@dataclass(frozen=True)
class Form:
    """How a checkpoint stores a tensor."""

    shape: torch.Size
    dtype: torch.dtype


def load_entries(
    module: nn.Module, entries: list[Entry], state: Mapping[str, torch.Tensor], others: set[str]
) -> dict[str, Form]:
    """Copy the tensors of a published ``state`` into the parameters and buffers of ``module``.

    Every tensor of ``state`` is read once. A single number may be stored in any shape of one number.
    ``module`` becomes float64 if a stored tensor is.

    Args:
        others: names that may be in ``state`` besides those of ``entries``; they are not read.

    Returns:
        How each tensor of ``entries`` was stored, by published name.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or not of floating point numbers.
    """
    expected = {entry.key for entry in entries}
    for key in state:
        if key not in expected and key not in others:
            found = tuple(state[key].shape)
            raise CheckpointError(f"{key}: found a tensor of shape {found}; expected no tensor of this name")
    tensors = named_tensors(module)
    forms = {}
    for entry in entries:
        target = entry.view(tensors[entry.name].detach())
        if entry.key not in state:
            shape = tuple(target.shape)
            raise CheckpointError(
                f"{entry.key}: missing from the checkpoint; expected a tensor of shape {shape}"
            )
        stored = state[entry.key]
        forms[entry.key] = Form(stored.shape, stored.dtype)
        _check_form(entry.key, stored, target.shape)
        if stored.dtype == torch.float64 != target.dtype:
            tensors = named_tensors(module.double())
            target = entry.view(tensors[entry.name].detach())
        target.copy_(stored.reshape(target.shape))
    return forms


def _check_form(key: str, stored: torch.Tensor, shape: torch.Size) -> None:
    if stored.shape != shape and not stored.numel() == shape.numel() == 1:
        raise CheckpointError(f"{key}: found shape {tuple(stored.shape)}; expected {tuple(shape)}")
    if not stored.dtype.is_floating_point:
        found = str(stored.dtype).removeprefix("torch.")
        raise CheckpointError(f"{key}: found {found} numbers; expected floating point numbers")


def collect(entries: list[Entry], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse: our tensors by parameter name -> copies under published names."""
    return {entry.key: entry.view(tensors[entry.name]).detach().clone() for entry in entries}


def decoder_entries(decoder: Decoder, *, list_experts: bool) -> list[Entry]:
    """Entries of a decoder; ``list_experts`` for checkpoints that hold every expert by itself."""
    entries = [Entry("model.embedding.weight", "embedding.weight")]
    for group in ("stateless_layers", "layers", "final_stateless_layers"):
        for index, layer in enumerate(getattr(decoder, group)):
            place = f"{group}.{index}"
            entries += [e.under(f"model.{place}", place) for e in _layer(layer, list_experts)]
    entries += [Entry(f"model.head.{kind}", f"lm_head.{kind}") for kind in ("weight", "bias")]
    if decoder.head_norm is not None:
        entries += [e.under("model.head_norm", "head_norm") for e in _whole(decoder.head_norm)]
    return entries


def encoder_entries(encoder: Encoder) -> list[Entry]:
    """Entries of an encoder."""
    entries = [Entry("model.embedding.weight", "embedding.weight")]
    for index, layer in enumerate(encoder.layers):
        place = f"layers.{index}"
        assert isinstance(layer, Layer)
        entries += [e.under(f"model.{place}", place) for e in _layer(layer, list_experts=False)]
    return entries


def mlm_head_entries(head: MLMHead) -> list[Entry]:
    """Entries of an MLM head."""
    entries = [e.under("dense", "dense") for e in _whole(head.dense)]
    entries += [e.under("layer_norm", "norm") for e in _whole(head.norm)]
    return entries + [Entry(f"decoder.{kind}", kind) for kind in ("weight", "bias")]


def _whole(module: nn.Module) -> Iterator[Entry]:
    for name, _ in module.named_parameters():
        yield Entry(name, name)


def _layer(layer: Layer, list_experts: bool) -> Iterator[Entry]:
    norms = {
        "attention_norm": "norm1",
        "cross_norm": "norm2",
        "feed_forward_norm": "norm3",
        "stm_norm": "stm_norm",
    }
    for ours, key in norms.items():
        norm = getattr(layer, ours)
        if norm is not None:
            yield from (e.under(key, ours) for e in _whole(norm))
    yield from (e.under("attention", "attention") for e in _attention(layer.attention))
    if layer.cross_attention is not None:
        cross = _attention(layer.cross_attention)
        yield from (e.under("memory_cross_attention", "cross_attention") for e in cross)
    if isinstance(layer.feed_forward, MoE):
        entries = _moe(layer.feed_forward, list_experts)
    else:
        entries = _feed_forward(layer.feed_forward)
    yield from (e.under("ff", "feed_forward") for e in entries)


def _attention(attention: SelfAttention | CrossAttention) -> Iterator[Entry]:
    query = attention.query_heads * attention.head_width
    kv = attention.kv_heads * attention.head_width
    if isinstance(attention, SelfAttention):
        yield Entry("q_proj.weight", "qkv.weight", rows=(0, query))
        yield Entry("k_proj.weight", "qkv.weight", rows=(query, kv))
        yield Entry("v_proj.weight", "qkv.weight", rows=(query + kv, kv))
    else:
        yield Entry("q_proj.weight", "q.weight")
        yield Entry("k_proj.weight", "kv.weight", rows=(0, kv))
        yield Entry("v_proj.weight", "kv.weight", rows=(kv, kv))
    yield from (e.under("out_proj", "out") for e in _whole(attention.out))
    if attention.gate is not None:
        yield Entry("gate_proj.weight", "gate.weight")


def _feed_forward(feed_forward: FeedForward) -> Iterator[Entry]:
    first = "fc1.linear" if feed_forward.gated else "fc1"
    for kind in ("weight", "bias"):
        yield Entry(f"{first}.{kind}", f"in_proj.{kind}")
        yield Entry(f"fc2.{kind}", f"out_proj.{kind}")


def _moe(moe: MoE, list_experts: bool) -> Iterator[Entry]:
    yield Entry("router.gate.weight", "router.proj.weight")
    if list_experts:
        yield from _listed("experts", "experts", moe.config.num_experts, moe.experts.gated)
    else:
        yield from _stacked("", "experts", biased=moe.experts.b_in is not None)
    if moe.output_bias is not None:
        yield Entry("global_bias", "output_bias")
    if isinstance(moe.shared, SharedExperts):
        yield from _shared(moe.shared, list_experts)
    elif moe.shared is not None:
        key = "shared_experts.0" if list_experts else "shared_expert"
        yield from (e.under(key, "shared") for e in _feed_forward(moe.shared))


def _shared(shared: SharedExperts, list_experts: bool) -> Iterator[Entry]:
    yield Entry("shared_expert_gate.weight", "shared.gate.weight")
    if list_experts:
        yield from _listed("shared_experts", "shared", shared.w_in.shape[0], shared.gated)
    else:
        yield from _stacked("shared_", "shared", biased=shared.b_in is not None)
    if shared.output_bias is not None:
        yield Entry("shared_experts_bias", "shared.output_bias")


def _stacked(prefix: str, name: str, *, biased: bool) -> Iterator[Entry]:
    yield Entry(f"{prefix}w1", f"{name}.w_in", transposed=True)
    yield Entry(f"{prefix}w2", f"{name}.w_out", transposed=True)
    if biased:
        yield Entry(f"{prefix}b1", f"{name}.b_in")
        yield Entry(f"{prefix}b2", f"{name}.b_out")


def _listed(key: str, name: str, count: int, gated: bool) -> Iterator[Entry]:
    first = "fc1.linear" if gated else "fc1"
    for index in range(count):
        yield Entry(f"{key}.{index}.{first}.weight", f"{name}.w_in", expert=index)
        yield Entry(f"{key}.{index}.{first}.bias", f"{name}.b_in", expert=index)
        yield Entry(f"{key}.{index}.fc2.weight", f"{name}.w_out", expert=index)
        yield Entry(f"{key}.{index}.fc2.bias", f"{name}.b_out", expert=index)
