"""Published memory attention, and whole training steps that use it, against recorded numbers.

The step fixtures hold four optimizer steps on padded batches of three conversations: what goes in, and
the losses, gradient norms, memories and final weights that came out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_parity_components import AUX_SCALE, assert_close, assert_gradients, fixtures, read

from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.config import COMPONENT_DEFAULTS
from rxt_dist.interchange.mapping import collect, named_tensors
from rxt_dist.interchange.memory import (
    MEMORY_DEFAULTS,
    VARIANTS,
    memory_attention_config,
    memory_attention_entries,
)
from rxt_dist.interchange.reference import (
    ReferenceDecoder,
    ReferenceEncoder,
    ReferenceMemoryAttention,
    ReferenceModule,
    load_reference,
)
from rxt_dist.model import MemoryAttention
from rxt_dist.model.initialisation import initialise

# After Adam's division by its second moment, rounding in a tensor's smallest gradients shows in its
# largest relative error; the relative error of the whole tensor stays where it was.
TOLERANCE_AFTER_ADAM = 1e-5
CLIP_NORM = 1.0
COMMON = {
    "num_layers": 2,
    "embed_dim": 64,
    "att_heads": 8,
    "seq_len": 20,
    "stm_size": 20,
    "att_groups": 4,
    "att_query_groups": 4,
}
TEXT = {**COMMON, "vocab_size": 97, "ff_dim": 48}
EXPERTS = {
    "use_moe": True,
    "num_experts": 6,
    "moe_top_k": 2,
    "num_shared_experts": 0,
    "use_vectorized_moe": False,
}
MEMORY = {
    **COMMON,
    "interlayer_att_groups": 4,
    "interlayer_att_query_groups": 4,
    "use_gated_residual": True,
    "residual_gate_type": "linear",
    "use_tanh_residual_gate": False,
}


def load_memory(cls: str, config: Mapping[str, Any], state: Mapping[str, Any]) -> ReferenceMemoryAttention:
    loaded = load_reference(cls, config, state)
    assert isinstance(loaded, ReferenceMemoryAttention)
    return loaded


def load_encoder(state: Mapping[str, torch.Tensor]) -> ReferenceEncoder:
    loaded = load_reference("RxTEncoder", {**TEXT, "skip_memory_cross_attention": True}, state)
    assert isinstance(loaded, ReferenceEncoder)
    return loaded


def load_decoder(state: Mapping[str, torch.Tensor]) -> ReferenceDecoder:
    loaded = load_reference("RxTDecoder", {**TEXT, **EXPERTS}, state)
    assert isinstance(loaded, ReferenceDecoder)
    return loaded


def assert_close_as_a_whole(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert ((ours - theirs).norm() / theirs.norm()).item() <= TOLERANCE_AFTER_ADAM, what


def gradients_by_component(components: Mapping[str, ReferenceModule]) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{name}": gradient
        for component, module in components.items()
        for name, gradient in module.reference_gradients().items()
    }


def assert_weights(module: ReferenceModule, recorded: Mapping[str, torch.Tensor]) -> None:
    ours = module.reference_tensors()
    assert set(ours) == set(recorded)
    for name, weight in recorded.items():
        assert_close_as_a_whole(ours[name], weight, name)


def clipped_step(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Clip the gradients, update, and return their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    optimizer.step()
    return norm


@pytest.mark.parametrize("name", fixtures("mem_"))
def test_memory_attention(name: str) -> None:
    fixture = read(name)
    memory = load_memory(fixture["cls"], fixture["config"], fixture["state_dict"])
    encoded = fixture["ed"].requires_grad_()
    after = memory.forward_padded(encoded, fixture["attention_mask"], fixture["stm"])
    assert_close(after, fixture["new_stm"], "new STM")
    (after * fixture["loss_weight"]).sum().backward()
    assert_close(encoded.grad, fixture["ed_grad"], "gradient of the encoding")
    assert_gradients(memory, fixture["grads"])
    assert sum(p.numel() for p in memory.module.parameters()) == fixture["params"]
    assert torch.equal(memory.stored_stm, fixture["state_dict"]["model.stm.memory"])


def test_self_supervised_memory_steps() -> None:
    """Each interaction is one step: write it, and move the memory towards a mean of old and encoded."""
    fixture = read("memory_attention_step.pt")
    encoder = load_encoder(fixture["state_dicts"]["encoder"])
    state = fixture["state_dicts"]["memory_attention"]
    memory = load_memory("RxTSelfInterlayerMemoryAttention", MEMORY, state)
    parameters = list(memory.parameters())
    optimizer = torch.optim.AdamW(parameters, **fixture["optimizer"])
    stm = fixture["stm0"]
    for step in fixture["steps"]:
        ids, mask = step["input_ids"], step["attention_mask"]
        with torch.no_grad():
            _, encoded = encoder.forward_padded(ids, mask)
        stm = stm.detach()
        after = memory.forward_padded(encoded, mask, stm)
        # Slot s is compared with the encoding of position s, padded positions included.
        kept, written = step["weights"]
        loss = -F.cosine_similarity(after, kept * stm + written * encoded, dim=-1, eps=1e-8).mean()
        optimizer.zero_grad()
        loss.backward()
        for name, gradient in step.get("grads", {}).items():
            ours = gradients_by_component({"memory_attention": memory})[name]
            assert_close_as_a_whole(ours, gradient, name)
        assert_close(clipped_step(optimizer, parameters), step["grad_norm"], "gradient norm")
        assert_close(loss, step["loss"], "loss")
        assert_close(after, step["new_stm"], "new STM")
        stm = after
    assert_weights(memory, fixture["state_dict_after"])


def test_supervised_memory_aware_steps() -> None:
    """Each interaction is one step: write the previous one, and answer with that memory."""
    fixture = read("smat_steps.pt")
    states = fixture["state_dicts"]
    encoder, decoder = load_encoder(states["encoder"]), load_decoder(states["decoder"])
    decoder.module.embedding = encoder.module.embedding
    memory = load_memory("RxTSelfInterlayerMemoryAttention", MEMORY, states["memory_attention"])
    components = {"encoder": encoder, "decoder": decoder, "memory_attention": memory}
    parameters = list(torch.nn.ModuleList(components.values()).parameters())
    optimizer = torch.optim.AdamW(parameters, **fixture["optimizer"])
    stm, previous = fixture["stm0"], None
    for step in fixture["steps"]:
        ids, mask = step["input_ids"], step["attention_mask"]
        stm = stm.detach()
        if previous is not None:
            _, encoded = encoder.forward_padded(previous["input_ids"], previous["attention_mask"])
            stm = memory.forward_padded(encoded, previous["attention_mask"], stm)
        output = decoder.run_padded(ids, mask, stm)
        logits = decoder.module.lm_head(output.hidden).view(*ids.shape, -1)
        loss = answer_loss(logits, step) + AUX_SCALE * output.aux_sum / ids.numel()
        optimizer.zero_grad()
        loss.backward()
        ours = gradients_by_component(components)
        if "grads" in step:
            assert set(ours) - set(step["grads"]) == {"decoder.model.embedding.weight"}  # the shared table
        for name, gradient in step.get("grads", {}).items():
            assert_close_as_a_whole(ours[name], gradient, name)
        assert_close(clipped_step(optimizer, parameters), step["grad_norm"], "gradient norm")
        assert_close(loss, step["loss"], "loss")
        assert_close(logits[mask.bool()], step["logits"][mask.bool()], "logits")
        assert_close(stm, step["stm"], "STM")
        previous = step
    for component, module in components.items():
        assert_weights(module, fixture["after"][component])


def answer_loss(logits: torch.Tensor, step: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the answer's tokens, [A] and [EOS] included, each from the row before it."""
    column = torch.arange(logits.shape[1])
    start = step["query_lengths"][:, None]
    in_answer = (column >= start) & (column < start + step["answer_lengths"][:, None])
    return F.cross_entropy(logits[:, :-1][in_answer[:, 1:]], step["input_ids"][:, 1:][in_answer[:, 1:]])


SMALL: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 16,
    "att_heads": 4,
    "seq_len": 8,
    "stm_size": 6,
    "att_groups": 2,
    "att_query_groups": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "no-gate": {},
    "static": {"use_gated_residual": True},
    "elementwise-shared": {
        "use_gated_residual": True,
        "residual_gate_type": "elementwise",
        "residual_per_slot_gate": False,
    },
    "linear-status": {
        "use_gated_residual": True,
        "residual_gate_type": "linear",
        "residual_gate_slot_status_type": "linear",
        "use_gate_for_self_attention": True,
    },
    "rms": {"norm_type": "rms", "norm_per_dim_scale": True},
    "adaptive": {"norm_type": "adaptive"},
    "positional": {"norm_type": "positional"},
    "layer": {"norm_type": "layer", "norm_init_gate": -1.0},
    "types": {"att_type": "mha", "self_att_type": "gqa", "interlayer_att_type": "mqa"},
    "widths": {
        "interlayer_att_groups": 1,
        "interlayer_att_query_groups": 4,
        "self_att_groups": 4,
        "self_att_query_groups": 1,
    },
}


def memory_checkpoint(cls: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A random network's complete configuration, and its tensors under published names."""
    others = {f"{kind}_att_query_groups": 1 for kind in ("self", "interlayer")}
    own = {**SMALL, **others, **config}
    values = {**COMPONENT_DEFAULTS, **MEMORY_DEFAULTS, **own}
    module = MemoryAttention(memory_attention_config(VARIANTS[cls], values, {}))
    initialise(module, seed=4)
    return own, collect(memory_attention_entries(module), named_tensors(module))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cls", VARIANTS)
def test_round_trip(cls: str, name: str) -> None:
    config, state = memory_checkpoint(cls, CONFIGS[name])
    loaded = load_memory(f"somewhere.else.{cls}", config, state)
    written = loaded.reference_tensors()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    held = named_tensors(loaded.module).values()
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in held)
    assert loaded.stored_stm is None
    after = loaded.forward_padded(torch.randn(2, 3, 7, 16), None, torch.randn(2, 3, 6, 16))
    assert after.shape == (2, 3, 6, 16)


def shapes_of(cls: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    _, state = memory_checkpoint(cls, config)
    return {
        key.removeprefix("model.").replace(".1.", "."): tuple(value.shape)
        for key, value in state.items()
        if ".0." not in key
    }


def test_published_layouts() -> None:
    """Names and shapes as published, not only consistent with themselves."""
    shapes = shapes_of("RxTSelfInterlayerMemoryAttention", CONFIGS["linear-status"])
    assert shapes["attention_layers.q_proj.weight"] == (8, 16)
    assert shapes["mean_attention_layers.out_proj.bias"] == (16,)
    assert shapes["mean_stm_norm.weight"] == shapes["memory_input_norm_layers.weight"] == (16,)
    assert shapes["mean_residual_gate_layers.gate.weight"] == (6, 6)
    assert shapes["interlayer_gate_layers.slot_status.weight"] == (1, 16)
    assert shapes["residual_gate_layers.slot_status.bias"] == (1,)
    own = shapes_of("RxTSelfMemoryAttention", {**CONFIGS["elementwise-shared"], **CONFIGS["layer"]})
    assert own["residual_gate_layers.gate"] == (1,)
    assert own["self_memory_norm_layers.norm.weight"] == (16,)
    assert own["self_memory_norm_layers.gate"] == (1,)
    assert not any(key.startswith("self_residual_gate") for key in own)
    static = shapes_of("RxTSimpleMemoryAttention", CONFIGS["static"])
    assert static["residual_gate_layers.gate"] == (6, 1)


def test_single_numbers_may_be_stored_in_any_shape() -> None:
    config, state = memory_checkpoint("RxTSelfInterlayerMemoryAttention", CONFIGS["adaptive"])
    state = {
        key: torch.tensor(0.5) if key.endswith(("ema_rms", "norm_layers.0.gate")) else value
        for key, value in state.items()
    }
    loaded = load_memory("RxTSelfInterlayerMemoryAttention", config, state)
    assert loaded.module.norm.gate[0].item() == 0.5
    assert (loaded.module.mean_norm.ema_rms == 0.5).all()


def test_query_heads_left_open_follow_the_stored_projection() -> None:
    config, state = memory_checkpoint("RxTSelfInterlayerMemoryAttention", {"interlayer_att_query_groups": 4})
    del config["interlayer_att_query_groups"]
    loaded = load_memory("RxTSelfInterlayerMemoryAttention", config, state)
    assert loaded.module.interlayer_attention.q.weight.shape == (2, 16, 16)


def test_replacing_instead_of_adding_is_kept() -> None:
    config, state = memory_checkpoint("RxTSimpleMemoryAttention", {"disable_residual": True})
    assert not load_memory("RxTSimpleMemoryAttention", config, state).module.residual


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        ("RxTSimpleMemoryAttention", {"norm_type": "batch"}, "norm_type is 'batch'; valid: classic-rms, rms"),
        (
            "RxTSimpleMemoryAttention",
            {"use_gated_residual": True, "residual_gate_type": "soft"},
            "residual_gate_type is 'soft'; valid: static",
        ),
        ("RxTSimpleMemoryAttention", {"att_type": "flex"}, "att_type is 'flex'; valid: mha"),
        (
            "RxTSelfMemoryAttention",
            {"use_gate_for_self_attention": True},
            "use_gate_for_self_attention is True",
        ),
        ("RxTGroupedSelfInterlayerMemoryAttention", {"num_groups": 3}, "not possible: .*num_groups"),
        ("RxTSimpleMemoryAttention", {"disable_residual": True, "use_gated_residual": True}, "gate.type"),
    ],
)
def test_impossible_configurations(cls: str, change: dict[str, Any], message: str) -> None:
    config, state = memory_checkpoint(cls, {})
    with pytest.raises(CheckpointError, match=message):
        load_reference(cls, {**config, **change}, state)


@pytest.mark.parametrize(
    ("key", "replacement", "message"),
    [
        ("model.mean_stm_norm.weight", None, r"model\.mean_stm_norm\.weight: missing .*shape \(16,\)"),
        ("model.attention_layers.1.k_proj.weight", torch.zeros(4, 16), r"found shape \(4, 16\); expected"),
        (
            "model.self_attention_layers.0.q_proj.weight",
            torch.zeros(8, 16),
            "expected no tensor of this name",
        ),
    ],
)
def test_wrong_tensors(key: str, replacement: torch.Tensor | None, message: str) -> None:
    config, state = memory_checkpoint("RxTSelfInterlayerMemoryAttention", {})
    state.pop(key, None)
    if replacement is not None:
        state[key] = replacement
    with pytest.raises(CheckpointError, match=message):
        load_reference("RxTSelfInterlayerMemoryAttention", config, state)
