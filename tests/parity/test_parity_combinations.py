"""Every switch of the published components, alone and in random combinations, against a naive second opinion.

Random combinations run in float64, where a wrong formula cannot hide behind rounding; each switch by itself
also runs in float32, as checkpoints are stored. Every combination makes the round trip through our model.
"""

from __future__ import annotations

from collections.abc import Mapping

import naive_reference as naive
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_samples import MEMORY_CLASSES, random_state, shapes_of
from published_strategies import FLAG, GATES, Config, decoder_configs, memory_configs, text_configs
from test_parity_components import assert_close, fixtures, read

from rxt_dist.config import ModelConfig
from rxt_dist.interchange import export_reference, load_reference, reference_of
from rxt_dist.interchange.mapping import Entry, collect, decoder_entries, load_entries
from rxt_dist.interchange.reference import (
    ReferenceDecoder,
    ReferenceEncoder,
    ReferenceMemoryAttention,
    ReferenceMLMHead,
    ReferenceModule,
)
from rxt_dist.model import Decoder, Memory, SequenceLayout

# Gradients that cancel to zero are compared with the size of the others: no relative error is left of them.
# Those of single numbers, sums over all slots and channels, do so more often; in float64 they are exact too.
FLOOR = 1e-3
FLOOR_OF_SINGLE_NUMBERS = {torch.float32: 0.3, torch.float64: FLOOR}
# The published auxiliary value has an epsilon of 1e-6 / (tokens * experts) that ours leaves out.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-6}
SIZES: Config = {
    "num_layers": 2,
    "vocab_size": 23,
    "embed_dim": 24,
    "ff_dim": 10,
    "att_heads": 4,
    "seq_len": 12,
    "stm_size": 5,
    "att_groups": 2,
    "att_query_groups": 2,
}
MOE: Config = {"use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 0}
DECODERS: dict[str, Config] = {
    "dense": {},
    "mha": {"self_att_type": "mha", "cross_att_type": "mha"},
    "gqa": {"self_att_type": "gqa", "cross_att_type": "gqa"},
    "mqa": {"self_att_type": "mqa", "cross_att_type": "mqa"},
    "sqa": {"att_groups": 1, "att_query_groups": 2, "cross_att_groups": 2, "cross_att_query_groups": 4},
    "xsqa": {"att_groups": 1, "att_query_groups": 1},
    "reverse sqa": {"att_groups": 4, "att_query_groups": 2, "cross_att_query_groups": 1},
    "gated": {"use_gated_attention": True},
    "gated cross only": {"use_gated_cross_attention": True},
    "gated self only": {"use_gated_attention": True, "use_gated_cross_attention": False},
    "no output bias": {"use_attention_output_bias": False},
    "no positions": {"use_nope": True},
    "rope base": {"rope_base": 500},
    "layer norm": {"use_rms_norm": False},
    "head layer norm": {"use_head_norm": True},
    "head rms norm": {"use_head_norm": True, "head_norm_type": "rms_norm"},
    "ungated": {"use_gated": False, "ff_activation": "relu"},
    "gelu": {"ff_activation": "gelu"},
    "no stm norm": {"stm_norm": False},
    "halves": {"rope_layout": "halves"},
    "causal cross": {"causal_cross": True},
    "causal cross, many slots": {"legacy_causal_cross": True, "stm_size": 11},
    "moe list": {**MOE, "use_vectorized_moe": False},
    "moe list shared": {**MOE, "use_vectorized_moe": False, "num_shared_experts": 1},
    "moe list several shared": {**MOE, "use_vectorized_moe": False, "num_shared_experts": 3},
    "moe local": {**MOE, "moe_bias_mode": "local"},
    "moe global": {**MOE, "moe_bias_mode": "global"},
    "moe off": {**MOE, "moe_bias_mode": "off", "use_gated": False},
    "moe one shared": {**MOE, "num_shared_experts": 1, "shared_expert_dim": 7},
    "moe shared local": {**MOE, "num_shared_experts": 2, "moe_shared_experts_bias_mode": "local"},
    "moe shared global": {**MOE, "num_shared_experts": 3, "moe_shared_experts_bias_mode": "global"},
    "moe shared off": {**MOE, "num_shared_experts": 2, "moe_shared_experts_bias_mode": "off"},
    "moe weighted": {**MOE, "num_shared_experts": 3, "moe_use_weighted_shared_experts": True},
    "stateless": {
        **MOE,
        "stateless_layers_config": ["moe", "dense"],
        "final_stateless_layers_config": ["dense", "moe"],
        "dense_layer_dim": 14,
    },
}
ENCODERS: dict[str, Config] = {
    "skip": {"skip_memory_cross_attention": True},
    "cross-attention": {"cross_att_groups": 1},
    "cross-attention without norm": {"stm_norm": False},
    "stored memory": {"skip_memory_cross_attention": True, "legacy_stm_in_encoder": True},
    "halves": {"rope_layout": "halves"},
}
MEMORIES: dict[str, Config] = {
    "no gate": {},
    **GATES,
    **{
        f"{norm}{' per dim' if per_dim else ''}": {"norm_type": norm, "norm_per_dim_scale": per_dim}
        for norm in ("rms", "adaptive", "positional", "layer")
        for per_dim in (False, True)
    },
    "halves": {"rope_layout": "halves"},
    "mha": {"att_type": "mha", "self_att_type": "gqa", "interlayer_att_type": "mqa"},
}
MEMORY_SIZES: Config = {
    "num_layers": 4,
    "embed_dim": 24,
    "att_heads": 4,
    "seq_len": 12,
    "stm_size": 5,
    "att_groups": 2,
    "att_query_groups": 4,
}
OWN: dict[str, Config] = {
    "RxTSelfMemoryAttention": {"self_att_groups": 4, "self_att_query_groups": 2},
    "RxTInterlayerMemoryAttention": {"interlayer_att_groups": 1, "interlayer_att_query_groups": 1},
    "RxTSelfInterlayerMemoryAttention": {"interlayer_att_groups": 2, "interlayer_att_query_groups": 1},
    "RxTGroupedSelfInterlayerMemoryAttention": {
        "interlayer_att_groups": 2,
        "interlayer_att_query_groups": 2,
        "num_groups": 2,
    },
}


def as_leaves(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.clone().requires_grad_() for key, tensor in state.items()}


def right_padded(batch: int, length: int, seed: int) -> torch.Tensor:
    """int64 mask [B, T] of random numbers of real positions, at least one each and one full."""
    real = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    real[0] = length
    return (torch.arange(length) < real[:, None]).long()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, what: str, floor: float = 1e-30) -> None:
    assert ours.shape == theirs.shape, what
    worst = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(floor)
    assert worst.item() <= TOLERANCE[theirs.dtype], f"{what}: {worst.item():.1e}"


def assert_same_gradients(module: ReferenceModule, leaves: Mapping[str, torch.Tensor]) -> None:
    expected = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    ours = module.reference_gradients()
    assert set(expected) == set(ours) - {key for key in ours if not ours[key].any() and key not in expected}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for key, gradient in expected.items():
        floor = FLOOR_OF_SINGLE_NUMBERS[gradient.dtype] if gradient.numel() == 1 else FLOOR
        assert_same(ours[key].reshape(gradient.shape), gradient, f"gradient of {key}", floor * largest)


def assert_round_trip(module: ReferenceModule, config: Config, state: Mapping[str, torch.Tensor]) -> None:
    exported_config, exported = export_reference(module)
    assert exported_config == config
    assert list(exported) == list(state)
    for key, tensor in state.items():
        assert exported[key].dtype == tensor.dtype, key
        assert torch.equal(exported[key], tensor), key


def assert_exportable(module: ReferenceModule) -> None:
    """What knows our configuration alone can be published, and read back, with the same numbers."""
    wrapped = reference_of(module.module, module.model_config, module.stored_stm)
    config, state = export_reference(wrapped)
    loaded = load_reference(wrapped.cls, config, state)
    assert loaded.cls == module.cls
    assert loaded.model_config == module.model_config
    ours, theirs = module.module.state_dict(), loaded.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if module.stored_stm is not None and not isinstance(module, ReferenceEncoder):
        assert torch.equal(loaded.stored_stm, module.stored_stm)
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: torch.Size(shape) for key, shape in shapes_of(wrapped.cls, config) if key in state
    }


def weighted(outputs: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """A scalar that depends on every output differently."""
    generator = torch.Generator().manual_seed(seed)
    return (outputs * torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)).sum()


def compare_decoder(
    config: Config, dtype: torch.dtype, batch: int, length: int, slots: int, lanes: int, masked: bool
) -> None:
    """Logits, auxiliary value and every gradient; ``lanes`` 0 stands for a memory [L, S, D]."""
    state = random_state("RxTDecoder", config, dtype=dtype)
    module = load_reference("RxTDecoder", config, state)
    assert isinstance(module, ReferenceDecoder)
    assert_round_trip(module, config, state)
    assert_exportable(module)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config["vocab_size"], (batch, length), generator=generator)
    mask = right_padded(batch, length, seed=2) if masked else None
    shape = [config["num_layers"], lanes, slots, config["embed_dim"]]
    stm = torch.randn([n for n in shape if n], generator=generator, dtype=dtype).requires_grad_()
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()

    leaves = as_leaves(state)
    logits, aux = naive.decoder(config, leaves, ids, mask, stm)
    loss = weighted(logits[real]) + (0.0 if aux is None else aux)
    (stm_gradient,) = torch.autograd.grad(loss, stm, retain_graph=True)
    loss.backward()

    output = module.run_padded(ids, mask, stm)
    ours = module.module.lm_head(output.hidden).view(*ids.shape, -1)
    assert_same(ours[real], logits[real], "logits")
    total = weighted(ours[real])
    if aux is None:
        assert output.aux_sum.item() == 0.0
    else:
        assert_same(output.aux_sum / ids.numel(), aux, "auxiliary value")
        total = total + output.aux_sum / ids.numel()
    (ours_stm_gradient,) = torch.autograd.grad(total, stm, retain_graph=True)
    assert_same(ours_stm_gradient, stm_gradient, "gradient of the memory")
    total.backward()
    assert_same_gradients(module, leaves)


def compare_encoder(
    config: Config, dtype: torch.dtype, batch: int, length: int, slots: int | None, masked: bool
) -> None:
    """All layers, MLM logits and every gradient; reads a memory of ``slots`` where given."""
    state = random_state("RxTEncoder", config, dtype=dtype)
    module = load_reference("RxTEncoder", config, state)
    head_config = {"embed_dim": config["embed_dim"], "vocab_size": config["vocab_size"]}
    head_state = random_state("MLMHead", head_config, dtype=dtype, seed=5)
    head = load_reference("MLMHead", head_config, head_state)
    assert isinstance(module, ReferenceEncoder)
    assert isinstance(head, ReferenceMLMHead)
    assert_round_trip(module, config, state)
    assert_exportable(module)
    assert_round_trip(head, head_config, head_state)
    assert_exportable(head)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config["vocab_size"], (batch, length), generator=generator)
    mask = right_padded(batch, length, seed=2) if masked else None
    stm = None
    if slots is not None:
        shape = (config["num_layers"], batch, slots, config["embed_dim"])
        stm = torch.randn(shape, generator=generator, dtype=dtype)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()

    leaves, head_leaves = as_leaves(state), as_leaves(head_state)
    layers = naive.encoder(config, leaves, ids, mask, stm)
    logits = naive.mlm_head(head_leaves, layers[-1])
    (weighted(layers[:, real]) + weighted(logits[real])).backward()

    last, ours = module.forward_padded(ids, mask, stm)
    ours_logits = head.forward_padded(last)
    assert torch.equal(last, ours[-1])
    assert_same(ours[:, real], layers[:, real], "layers")
    assert_same(ours_logits[real], logits[real], "MLM logits")
    (weighted(ours[:, real]) + weighted(ours_logits[real])).backward()
    assert_same_gradients(module, leaves)
    assert_same_gradients(head, head_leaves)


def compare_memory(
    cls: str, config: Config, dtype: torch.dtype, batch: int, length: int, lanes: int, training: bool
) -> None:
    """The new memory, every gradient, and the running means after it; ``lanes`` as of the decoder."""
    state = random_state(cls, config, dtype=dtype)
    module = load_reference(f"some.module.{cls}", config, state)
    assert isinstance(module, ReferenceMemoryAttention)
    assert module.cls == cls
    assert_round_trip(module, config, state)
    assert_exportable(module)
    module.train(training)
    generator = torch.Generator().manual_seed(1)
    mask = right_padded(batch, length, seed=2)
    shape = [config["num_layers"], lanes, config["stm_size"], config["embed_dim"]]
    stm = torch.randn([n for n in shape if n], generator=generator, dtype=dtype).requires_grad_()
    shape = [config["num_layers"], batch, length, config["embed_dim"]]
    encoded = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    leaves = as_leaves(state)
    network = naive.MemoryAttention(cls, config, leaves, training=training)
    expected = network(encoded, mask, stm)
    inputs = torch.autograd.grad(weighted(expected), (encoded, stm), retain_graph=True)
    weighted(expected).backward()

    after = module.forward_padded(encoded, mask, stm)
    assert_same(after, expected, "new memory")
    ours = torch.autograd.grad(weighted(after), (encoded, stm), retain_graph=True)
    for what, gradient, theirs in zip(("encoding", "memory"), ours, inputs, strict=True):
        assert_same(gradient, theirs, f"gradient of the {what}")
    weighted(after).backward()
    trained = {key: leaf for key, leaf in leaves.items() if not key.endswith("ema_rms")}
    assert_same_gradients(module, trained)
    tensors = module.reference_tensors()
    for key, average in network.averages.items():
        assert_same(tensors[key].reshape(average.shape), average.detach(), key)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_switches(name: str) -> None:
    config = {**SIZES, **DECODERS[name]}
    for dtype in TOLERANCE:
        compare_decoder(config, dtype, batch=3, length=9, slots=config["stm_size"], lanes=3, masked=True)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("reads", [False, True])
def test_encoder_switches(name: str, reads: bool) -> None:
    config = {**SIZES, **ENCODERS[name]}
    if reads and config.get("skip_memory_cross_attention", False):
        pytest.skip("has no memory cross-attention")
    for dtype in TOLERANCE:
        compare_encoder(config, dtype, batch=3, length=9, slots=7 if reads else None, masked=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("cls", MEMORY_CLASSES)
def test_memory_attention_switches(cls: str, name: str, training: bool) -> None:
    config = {**MEMORY_SIZES, **OWN.get(cls, {}), **MEMORIES[name]}
    for dtype in TOLERANCE:
        compare_memory(cls, config, dtype, batch=3, length=9, lanes=3, training=training)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gate", ["static tanh", "linear status sigmoid", "elementwise shared tanh"])
def test_the_gate_of_the_self_attention_is_independent(gate: str, residual: bool) -> None:
    cls = "RxTSelfMemoryAttention"
    config = {**MEMORY_SIZES, **OWN[cls], **GATES[gate], "use_gate_for_self_attention": True}
    config["use_gated_residual"] = residual
    compare_memory(cls, config, torch.float64, batch=2, length=4, lanes=2, training=False)


def test_an_update_that_replaces_the_memory() -> None:
    config = {**MEMORY_SIZES, "disable_residual": True}
    compare_memory(
        "RxTSimpleMemoryAttention", config, torch.float64, batch=2, length=4, lanes=2, training=False
    )


random_combinations = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@random_combinations
@given(decoder_configs(), st.integers(1, 3), st.integers(1, 10), st.integers(1, 12), FLAG, st.data())
def test_decoder_combinations(
    config: Config, batch: int, length: int, slots: int, masked: bool, data: st.DataObject
) -> None:
    lanes = data.draw(st.sampled_from([0, 1, batch]))
    compare_decoder(config, torch.float64, batch, length, slots, lanes, masked)


@random_combinations
@given(text_configs(), FLAG, st.integers(1, 3), st.integers(1, 10), st.sampled_from([None, 1, 6]), FLAG)
def test_encoder_combinations(
    config: Config, skip: bool, batch: int, length: int, slots: int | None, masked: bool
) -> None:
    config = {**config, "skip_memory_cross_attention": skip}
    if skip:
        del config["stm_norm"]
    compare_encoder(config, torch.float64, batch, length, None if skip else slots, masked)


@random_combinations
@given(
    st.sampled_from(MEMORY_CLASSES), memory_configs(), st.integers(1, 3), st.integers(1, 10), FLAG, st.data()
)
def test_memory_attention_combinations(
    cls: str, config: Config, batch: int, length: int, training: bool, data: st.DataObject
) -> None:
    lanes = data.draw(st.sampled_from([0, 1, batch]))
    compare_memory(cls, config, torch.float64, batch, length, lanes, training)


def test_normed_queries_and_keys() -> None:
    """An option that no published constructor offers, so that its tensors have no published names."""
    config = {**SIZES, "att_query_groups": 4, "rope_layout": "halves"}
    state = random_state("RxTDecoder", config, dtype=torch.float64)
    values = load_reference("RxTDecoder", config, state).model_config.model_dump()
    for attention in ("attention", "cross_attention"):
        values["decoder"][attention]["qk_norm"] = True
    decoder = Decoder(ModelConfig.model_validate(values)).double()
    entries = decoder_entries(decoder, list_experts=False)
    for layer in range(config["num_layers"]):
        for ours, theirs in (("attention", "attention"), ("cross_attention", "memory_cross_attention")):
            for kind, short in (("query", "q"), ("key", "k")):
                key = f"model.layers.{layer}.{theirs}.{short}_norm.weight"
                entries.append(Entry(key, f"layers.{layer}.{ours}.{kind}_norm.weight"))
                state[key] = 1 + 0.3 * torch.randn(6, dtype=torch.float64)
    load_entries(decoder, entries, state, {key for key in state if "rope" in key or "stm.memory" in key})
    ids, stm = torch.arange(18).view(2, 9), state["model.stm.memory"]
    leaves = as_leaves(state)
    logits, _ = naive.decoder(config, leaves, ids, None, stm)
    weighted(logits).backward()
    layout = SequenceLayout.from_lengths([9, 9])
    ours = decoder.lm_head(decoder(ids.flatten(), layout, Memory.of_stm(stm, layout)).hidden).view(2, 9, -1)
    assert_same(ours, logits, "logits")
    weighted(ours).backward()
    gradients = collect(entries, {name: p.grad for name, p in decoder.named_parameters()})
    for key, gradient in gradients.items():
        assert_same(gradient, leaves[key].grad, key, floor=FLOOR)


def test_the_second_opinion_agrees_with_the_recordings() -> None:
    """It would be worth nothing if it had been fitted to our code."""
    for name in fixtures("dec_"):
        fixture = read(name)
        real = fixture["attention_mask"].bool()
        arguments = fixture["config"], fixture["state_dict"], fixture["input_ids"]
        logits, aux = naive.decoder(*arguments, fixture["attention_mask"], fixture["stm"])
        assert_close(logits[real], fixture["logits"][real], name)
        if fixture["aux"] is not None:
            assert_close(aux, fixture["aux"], name)
    for name in fixtures("enc_"):
        fixture = read(name)
        real = fixture["attention_mask"].bool()
        arguments = fixture["config"], fixture["state_dict"], fixture["input_ids"]
        layers = naive.encoder(*arguments, fixture["attention_mask"])
        assert_close(layers[:, real], fixture["layers"][:, real], name)
        logits = naive.mlm_head(fixture["head_state_dict"], layers[-1])
        assert_close(logits[real], fixture["mlm_logits"][real], name)
    for name in fixtures("mem_"):
        fixture = read(name)
        network = naive.MemoryAttention(
            fixture["cls"], fixture["config"], fixture["state_dict"], training=True
        )
        after = network(fixture["ed"], fixture["attention_mask"], fixture["stm"])
        assert_close(after, fixture["new_stm"], name)
