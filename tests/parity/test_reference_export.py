"""Writing components in the published format, and moving weights between the two rotary layouts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import naive_reference as naive
import pytest
import torch
from published_samples import MEMORY_CLASSES, random_state, shapes_of
from test_parity_components import assert_close, fixtures, read

from rxt_dist.config import ModelConfig
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.interchange import convert_rope_layout, export_reference, load_reference, reference_of
from rxt_dist.model import Decoder, Encoder, MemoryAttention, MLMHead, build_model

ATTENTION = {"query_heads": 2, "kv_heads": 4}
MODEL: dict[str, Any] = {
    "name": "sample",
    "vocab_size": 11,
    "embed_dim": 16,
    "seq_len": 9,
    "stm_size": 6,
    "encoder": {"num_layers": 2, "heads": 4, "ff_dim": 12, "attention": ATTENTION},
    "decoder": {
        "num_layers": 2,
        "heads": 4,
        "ff_dim": 12,
        "attention": ATTENTION,
        "cross_attention": {"query_heads": 1, "kv_heads": 1, "gated": True},
        "moe": {"num_experts": 3, "top_k": 2, "num_shared_experts": 1, "bias": "global"},
        "final_stateless_layers": ["dense"],
        "dense_layer_dim": 7,
    },
    "memory_attention": {"heads": 2, "attention": {"query_heads": 2, "kv_heads": 1}},
}
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": 11,
    "embed_dim": 24,
    "ff_dim": 12,
    "att_heads": 4,
    "seq_len": 8,
    "stm_size": 6,
    "att_groups": 2,
    "att_query_groups": 4,
    "cross_att_groups": 4,
    "cross_att_query_groups": 2,
}
MEMORY = {
    **{key: value for key, value in SMALL.items() if key not in ("vocab_size", "ff_dim")},
    **{f"{kind}_att_query_groups": 1 for kind in ("self", "interlayer")},
}
IDS = torch.arange(10).view(2, 5)


def model_config(**changes: Any) -> ModelConfig:
    """``MODEL`` with fields replaced; names of sections replace fields inside them."""
    values = {
        key: {**MODEL[key], **value} if isinstance(value, dict) else value for key, value in changes.items()
    }
    return ModelConfig.model_validate({**MODEL, **values})


@pytest.mark.parametrize("name", [*fixtures("dec_"), *fixtures("enc_"), *fixtures("mem_")])
def test_recorded_components_come_back_bit_by_bit(name: str) -> None:
    fixture = read(name)
    components = [(fixture["cls"], fixture["config"], fixture["state_dict"])]
    if "head_state_dict" in fixture:
        components.append(("MLMHead", {"embed_dim": 64, "vocab_size": 97}, fixture["head_state_dict"]))
    for cls, config, state in components:
        loaded = load_reference(cls, config, state)
        exported_config, exported = export_reference(loaded)
        assert loaded.cls == cls
        assert exported_config == config
        assert list(exported) == list(state)
        for key, tensor in state.items():
            assert exported[key].dtype == tensor.dtype
            assert torch.equal(exported[key], tensor), key
        again = load_reference(cls, exported_config, exported)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("name", [*fixtures("dec_"), *fixtures("mem_")])
def test_rotary_tables_are_those_of_recorded_components(name: str) -> None:
    fixture = read(name)
    loaded = load_reference(fixture["cls"], fixture["config"], fixture["state_dict"])
    _, exported = export_reference(reference_of(loaded.module, loaded.model_config))
    tables = [key for key in exported if ".rope." in key]
    assert len(tables) == 2
    for key in tables:
        assert torch.equal(exported[key], fixture["state_dict"][key])


def test_a_model_that_was_never_published() -> None:
    """Names and shapes as published, all of it, and the same numbers after loading."""
    config = model_config()
    model = build_model(config, seed=1)
    stm = torch.randn(2, 6, 16)
    ids, encoded = IDS % 11, torch.randn(2, 3, 5, 16)
    for component, cls in (
        (model.encoder, "RxTEncoder"),
        (model.decoder, "RxTDecoder"),
        (model.mlm_head, "MLMHead"),
        (model.memory_attention, "RxTSelfInterlayerMemoryAttention"),
    ):
        wrapped = reference_of(component, config, stm)
        arguments, state = export_reference(wrapped)
        assert wrapped.cls == cls
        assert {key: tuple(value.shape) for key, value in state.items()} == dict(shapes_of(cls, arguments))
        loaded = load_reference(cls, arguments, state)
        ours, theirs = dict(component.named_parameters()), dict(loaded.module.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        if isinstance(component, Decoder):
            expected, _ = naive.decoder(arguments, state, ids, None, stm)
            assert_close(wrapped.forward_padded(ids), expected, "decoder")
        elif isinstance(component, Encoder):
            expected = naive.encoder(arguments, state, ids, None)
            assert_close(wrapped.forward_padded(ids)[1], expected, "encoder")
        elif isinstance(component, MLMHead):
            expected = naive.mlm_head(state, encoded)
            assert_close(wrapped.forward_padded(encoded), expected, "MLM head")
        else:
            network = naive.MemoryAttention(cls, arguments, state, training=False)
            assert_close(wrapped.forward_padded(encoded), network(encoded, None, stm), "memory attention")


def test_exports_are_copies_of_the_present_weights() -> None:
    config = model_config()
    decoder = build_model(config, seed=1).decoder
    wrapped = reference_of(decoder, config)
    _, before = export_reference(wrapped)
    assert "model.stm.memory" not in before
    with torch.no_grad():
        decoder.lm_head.bias.add_(1.0)
    _, after = export_reference(wrapped)
    assert torch.equal(after["model.head.bias"], before["model.head.bias"] + 1.0)
    assert all(tensor.is_contiguous() for tensor in after.values())
    storages = {tensor.untyped_storage().data_ptr() for tensor in after.values()}
    assert len(storages) == len(after)


def test_a_memory_that_does_not_fit_is_refused() -> None:
    config = model_config()
    decoder = build_model(config, seed=1).decoder
    with pytest.raises(
        CheckpointError, match=r"model\.stm\.memory: found shape \(2, 1, 7, 16\); expected \(2, 1, 6, 16\)"
    ):
        reference_of(decoder, config, torch.zeros(2, 7, 16))


def test_a_selection_bias_is_refused_unless_it_is_zero() -> None:
    config = model_config(decoder={"moe": {"num_experts": 3, "top_k": 2, "bias_update_rate": 0.001}})
    decoder = build_model(config, 0).decoder
    stored = export_reference(reference_of(decoder, config))[1]
    assert not [key for key in stored if "selection" in key]
    decoder.layers[-1].feed_forward.router.selection_bias[2] = 1e-6
    with pytest.raises(ConfigError, match=r"moe\.bias_update_rate: found selection biases other than 0"):
        reference_of(decoder, config)


@pytest.mark.parametrize(
    ("changes", "component", "message"),
    [
        (
            {"decoder": {"attention": {**ATTENTION, "qk_norm": True}}},
            Decoder,
            "model.decoder.attention.qk_norm: found true",
        ),
        (
            {"decoder": {"attention": {**ATTENTION, "output_bias": False}}},
            Decoder,
            "model.decoder.cross_attention.output_bias: found true",
        ),
        (
            {"encoder": {"attention": {**ATTENTION, "qk_norm": True}}},
            Encoder,
            "model.encoder.attention.qk_norm: found true",
        ),
        (
            {"memory_attention": {"attention": {**ATTENTION, "gated": True}}},
            MemoryAttention,
            "model.memory_attention.attention.gated: found true, .*; valid: false",
        ),
        (
            {"memory_attention": {"interlayer_attention": {**ATTENTION, "output_bias": False}}},
            MemoryAttention,
            "model.memory_attention.interlayer_attention.output_bias: found false, .*; valid: true",
        ),
    ],
)
def test_what_published_components_do_not_have_is_refused(
    changes: dict[str, Any], component: type, message: str
) -> None:
    if component is MemoryAttention:
        changes["memory_attention"]["heads"] = 4
    config = model_config(**changes)
    with pytest.raises(ConfigError, match=message):
        reference_of(component(config), config)


@pytest.mark.parametrize("cls", ["RxTDecoder", *MEMORY_CLASSES])
def test_halves_before_equal_interleaved_after(cls: str) -> None:
    config = SMALL if cls == "RxTDecoder" else MEMORY
    state = random_state(cls, config)
    converted = convert_rope_layout(state, f"rxlm.{cls}", config, "interleaved")
    changed = {key for key in state if not torch.equal(state[key], converted[key])}
    part = "memory_cross_attention.k_proj" if cls == "RxTDecoder" else "attention_layers.{}.q_proj"
    place = "model.layers.{}." if cls == "RxTDecoder" else "model."
    assert changed == {f"{place}{part}.weight".format(layer) for layer in range(2)}
    back = convert_rope_layout(converted, cls, config, "halves")
    assert all(torch.equal(back[key], state[key]) for key in state)
    old = load_reference(cls, {**config, "rope_layout": "halves"}, state)
    new = load_reference(cls, {**config, "rope_layout": "interleaved"}, converted)
    wrong = load_reference(cls, config, state)
    if cls == "RxTDecoder":
        expected, _ = naive.decoder(
            {**config, "rope_layout": "halves"}, state, IDS, None, state["model.stm.memory"]
        )
        outputs = [model.forward_padded(IDS) for model in (old, new, wrong)]
    else:
        encoded, stm = torch.randn(2, 2, 5, 24), torch.randn(2, 2, 6, 24)
        network = naive.MemoryAttention(cls, {**config, "rope_layout": "halves"}, state, training=False)
        expected = network(encoded, None, stm)
        outputs = [model.forward_padded(encoded, None, stm) for model in (old, new, wrong)]
    assert_close(outputs[0], expected, "halves")
    assert_close(outputs[1], expected, "converted")
    assert (outputs[2] - expected).abs().max() > 0.01


def test_conversion_of_encoders_that_read_a_memory() -> None:
    state = random_state("RxTEncoder", SMALL)
    converted = convert_rope_layout(state, "RxTEncoder", SMALL, "interleaved")
    stm = torch.randn(2, 6, 24)
    old = load_reference("RxTEncoder", {**SMALL, "rope_layout": "halves"}, state)
    new = load_reference("RxTEncoder", SMALL, converted)
    assert_close(new.forward_padded(IDS, stm=stm)[1], old.forward_padded(IDS, stm=stm)[1], "reads")
    assert torch.equal(new.forward_padded(IDS)[1], old.forward_padded(IDS)[1])


def test_conversion_changes_nothing_where_nothing_is_rotated() -> None:
    config = {**SMALL, "use_nope": True}
    state = random_state("RxTDecoder", config)
    converted = convert_rope_layout(state, "RxTDecoder", config, "interleaved")
    assert all(converted[key] is state[key] for key in state)
    head = random_state("MLMHead", {"embed_dim": 24, "vocab_size": 11})
    converted = convert_rope_layout(head, "MLMHead", {"embed_dim": 24, "vocab_size": 11}, "halves")
    assert all(converted[key] is head[key] for key in head)


@pytest.mark.parametrize(
    ("cls", "change", "to", "message"),
    [
        ("RxTDecoder", {}, "quarters", "rope_layout is 'quarters'; valid: interleaved, halves"),
        ("Perceptron", {}, "halves", "class 'Perceptron' cannot be loaded"),
        (
            "RxTDecoder",
            {"att_heads": 24},
            "halves",
            r"k_proj\.weight: found shape \(24, 24\); expected whole heads",
        ),
        (
            "RxTDecoder",
            {"embed_dim": 40},
            "halves",
            r"k_proj\.weight: found shape \(24, 24\); expected whole heads",
        ),
        ("RxTDecoder", {"att_heads": "four"}, "halves", "att_heads is 'four'; valid: a whole number"),
    ],
)
def test_impossible_conversions(cls: str, change: dict[str, Any], to: str, message: str) -> None:
    state = random_state("RxTDecoder", SMALL)
    with pytest.raises(CheckpointError, match=message):
        convert_rope_layout(state, cls, {**SMALL, **change}, to)


def test_importing_the_package_does_not_load_the_model() -> None:
    code = "import sys, rxt_dist.interchange; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    import rxt_dist.interchange

    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = rxt_dist.interchange.load_everything
