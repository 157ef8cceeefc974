"""Encoder, decoder and heads: every variant trains, and packing changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_samples import (
    SYMMETRIC,
    VARIANTS,
    VOCAB,
    joint_parameters,
    joint_pass,
    model_config,
    perturb,
    random_tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

from rxt_dist.config import ModelConfig
from rxt_dist.model import Memory, RxTModel, SequenceLayout, build_model
from rxt_dist.model.canonical import canonical_parts


def built(config: ModelConfig) -> RxTModel:
    model = build_model(config, seed=0)
    perturb(model)
    return model


def loss_of(model: RxTModel, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    layers, output, _ = joint_pass(model, tokens, lengths)
    features = model.mlm_head(layers[-1])
    mlm = F.cross_entropy(
        F.linear(features, model.mlm_head.weight, model.mlm_head.bias), tokens, reduction="sum"
    )
    ar = F.cross_entropy(model.decoder.lm_head(output.hidden), tokens, reduction="sum")
    return mlm + ar + output.aux_sum


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[5, 3], [1], [0], [], [4, 0, 4]])
def test_every_parameter_gets_a_gradient(name: str, lengths: list[int]) -> None:
    model = built(VARIANTS[name])
    loss = loss_of(model, random_tokens(lengths), lengths)
    loss.backward()
    assert torch.isfinite(loss)
    for key, parameter in joint_parameters(model).items():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        if not sum(lengths):
            assert not parameter.grad.any(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_not_all_zero(name: str) -> None:
    model = built(VARIANTS[name])
    loss_of(model, random_tokens([9, 7, 12, 4]), [9, 7, 12, 4]).backward()
    for key, parameter in joint_parameters(model).items():
        assert parameter.grad is not None
        if key.endswith("router.proj.weight") and name == "shared-1-global":
            continue  # one visited expert has weight 1 whatever the router says
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_document_does_not_see_its_neighbours(name: str) -> None:
    """Outputs and gradients of a pack are those of its documents, each processed alone."""
    lengths = [4, 7, 1, 7]
    tokens = random_tokens(lengths)
    model = built(VARIANTS[name])
    layers, output, layout = joint_pass(model, tokens, lengths)
    loss_of(model, tokens, lengths).backward()
    packed = {key: parameter.grad.clone() for key, parameter in joint_parameters(model).items()}
    model.zero_grad(set_to_none=True)
    for start, end in zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
        own_layers, own_output, _ = joint_pass(model, tokens[start:end], [end - start])
        torch.testing.assert_close(own_layers, layers[:, start:end], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own_output.hidden, output.hidden[start:end], rtol=1e-4, atol=1e-5)
        loss_of(model, tokens[start:end], [end - start]).backward()
    for key, parameter in joint_parameters(model).items():
        assert (parameter.grad - packed[key]).abs().max() <= 1e-4 * packed[key].abs().max() + 1e-6, key


def test_the_decoder_is_causal_and_the_encoder_is_not() -> None:
    model = built(VARIANTS["moe"])
    tokens = random_tokens([8])
    changed = tokens.clone()
    changed[-1] = (changed[-1] + 1) % VOCAB
    layout = SequenceLayout.from_lengths([8])
    stm = torch.randn(2, 1, 8, 32)
    first, second = (
        model.decoder(ids, layout, Memory.of_stm(stm, layout)).hidden for ids in (tokens, changed)
    )
    torch.testing.assert_close(first[:-1], second[:-1])
    assert not torch.allclose(first[-1], second[-1])
    assert not torch.allclose(model.encoder(tokens, layout)[-1][0], model.encoder(changed, layout)[-1][0])


def test_layer_i_reads_memory_i() -> None:
    model = built(VARIANTS["dense"])
    tokens, layout = random_tokens([3, 4]), SequenceLayout.from_lengths([3, 4])
    stm = torch.randn(2, 2, 8, 32, requires_grad=True)
    model.decoder(tokens, layout, Memory.of_stm(stm, layout)).hidden[:3].sum().backward()
    assert stm.grad[:, 0].abs().amax(dim=(1, 2)).min() > 0
    assert not stm.grad[:, 1].any()  # lane 1 belongs to the second sequence


class _Additions(TorchDispatchMode):
    """Shapes of the tensors that are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_the_gradient_of_a_memory_is_not_added_up_layer_by_layer() -> None:
    model = built(model_config())
    lengths = [3, 2]
    layout = SequenceLayout.from_lengths(lengths)
    states = torch.randn(len(model.decoder.layers), 5, model.config.embed_dim, requires_grad=True)
    hidden = model.decoder(random_tokens(lengths), layout, Memory.of_sequence(states, layout)).hidden
    with _Additions() as additions:
        hidden.sum().backward()
    assert additions.shapes
    assert states.shape not in additions.shapes
    assert states.grad is not None
    assert all(gradient.any() for gradient in states.grad)


def test_positions_matter_unless_rope_is_off() -> None:
    def swapped_difference(config: ModelConfig) -> float:
        model = built(config)
        tokens = torch.tensor([5, 9, 11, 2])
        layout = SequenceLayout.from_lengths([4])
        other = model.encoder(tokens[[0, 2, 1, 3]], layout)[-1]
        return (model.encoder(tokens, layout)[-1][0] - other[0]).abs().max().item()

    assert swapped_difference(VARIANTS["moe"]) > 1e-3
    assert swapped_difference(VARIANTS["no-rope-ungated-gelu"]) < 1e-5


def test_without_memory_cross_attention_is_skipped() -> None:
    model = built(VARIANTS["dense"])
    tokens, layout = random_tokens([5]), SequenceLayout.from_lengths([5])
    output = model.decoder(tokens, layout, None)
    assert output.aux_sum.item() == 0.0
    output.hidden.sum().backward()
    assert model.decoder.layers[0].cross_attention.q.weight.grad is None


def test_final_stateless_layers_are_left_out_of_the_balance() -> None:
    config = model_config(decoder={"final_stateless_layers": ["moe"]})
    model = built(config)
    _, output, _ = joint_pass(model, random_tokens([6]), [6])
    output.aux_sum.backward()
    assert model.decoder.final_stateless_layers[0].feed_forward.router.proj.weight.grad is None
    assert model.decoder.layers[0].feed_forward.router.proj.weight.grad.any()


def test_balance_is_the_mean_over_layers_of_the_sum_over_tokens() -> None:
    config = model_config(decoder={"stateless_layers": ["moe", "dense"]})
    model = built(config)
    seen: list[torch.Tensor] = []
    for layer in (*model.decoder.stateless_layers, *model.decoder.layers):
        layer.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    _, output, _ = joint_pass(model, random_tokens([6]), [6])
    values = [value.balance for value in seen if value is not None]
    assert len(values) == 3
    torch.testing.assert_close(output.aux_sum, sum(values) / 3)


def test_the_embedding_is_one_parameter() -> None:
    model = built(VARIANTS["moe"])
    assert model.decoder.embedding.weight is model.encoder.embedding.weight
    names = [key for key, _ in model.named_parameters() if "embedding" in key]
    assert names == ["encoder.embedding.weight"]


def test_unused_encoder_weights_are_carried_but_not_trained() -> None:
    model = built(model_config(encoder={"memory_cross_attention": SYMMETRIC}))
    unused = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert unused
    assert all(".cross_" in key and key.startswith("encoder.") for key in unused)
    layout = SequenceLayout.from_lengths([4])
    before = model.encoder(random_tokens([4]), layout)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in unused:
                parameter.fill_(7.0)
    assert torch.equal(before, model.encoder(random_tokens([4]), layout))


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_stays_close_to_fp32(name: str) -> None:
    model = built(VARIANTS[name])
    lengths = [6, 3]
    tokens = random_tokens(lengths)
    exact, _, _ = joint_pass(model, tokens, lengths)
    half = model.to(torch.bfloat16)
    layers, output, _ = joint_pass(half, tokens, lengths)
    assert layers.dtype == output.hidden.dtype == torch.bfloat16
    assert output.aux_sum.dtype == torch.float32
    assert (layers.float() - exact).abs().max() < 0.05 * exact.abs().max()
    loss_of(half, tokens, lengths).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in joint_parameters(half).values())


@pytest.mark.parametrize("name", VARIANTS)
def test_canonical_parts_cover_every_parameter(name: str) -> None:
    model = built(VARIANTS[name])
    parts = canonical_parts(model)
    names = [part.name for found in parts.values() for part in found]
    assert len(names) == len(set(names))
    for key, parameter in model.named_parameters():
        assert sum(part.held for part in parts[key]) == parameter.numel(), key
        assert all(part.held == part.numel for part in parts[key]), key
    assert parts["encoder.layers.0.attention.qkv.weight"][0].name == "encoder.layers.0.attention.q.weight"
