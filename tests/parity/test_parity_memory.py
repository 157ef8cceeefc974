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

from rxt_dist.interchange.reference import (
    ReferenceDecoder,
    ReferenceEncoder,
    ReferenceMemoryAttention,
    ReferenceModule,
    load_reference,
)

# Adam moves a weight by its gradient over the gradient's size, whatever that is: where it is a millionth of
# its tensor's largest, its rounding error is as large as itself. The same steps in float64 differ from the
# recorded weights by 5e-5 at such places, as much as ours in float32 do. So 1e-5 is asked of each tensor as a
# whole and of every weight with a gradient worth the name (more than 99.9 % of them), and less of the others.
TOLERANCE_AFTER_ADAM = 1e-5
TOLERANCE_OF_NEARLY_ZERO_GRADIENTS = 1e-4
GRADIENT_WORTH_THE_NAME = 1e-5
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


def assert_weights(
    module: ReferenceModule, recorded: Mapping[str, torch.Tensor], steps: list[dict[str, torch.Tensor]]
) -> None:
    """The weights after ``steps``, given by their gradients."""
    ours = module.reference_tensors()
    assert set(ours) == set(recorded)
    kept = 0
    for name, weight in recorded.items():
        assert_close_as_a_whole(ours[name], weight, name)
        worth = torch.ones_like(weight, dtype=torch.bool)
        for gradient in (step[name].abs() for step in steps if name in step):
            worth &= (gradient >= GRADIENT_WORTH_THE_NAME * gradient.max()) | (gradient == 0)
        error = (ours[name] - weight).abs() / weight.abs().max()
        assert error[worth].max() <= TOLERANCE_AFTER_ADAM, name
        assert error.max() <= TOLERANCE_OF_NEARLY_ZERO_GRADIENTS, name
        kept += int(worth.sum())
    assert kept > 0.999 * sum(weight.numel() for weight in recorded.values())


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
    gradients = []
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
        gradients.append(memory.reference_gradients())
        for name, gradient in step.get("grads", {}).items():
            ours = gradients[-1][name.removeprefix("memory_attention.")]
            assert_close_as_a_whole(ours, gradient, name)
        assert_close(clipped_step(optimizer, parameters), step["grad_norm"], "gradient norm")
        assert_close(loss, step["loss"], "loss")
        assert_close(after, step["new_stm"], "new STM")
        stm = after
    assert_weights(memory, fixture["state_dict_after"], gradients)


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
    gradients: dict[str, list[dict[str, torch.Tensor]]] = {component: [] for component in components}
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
        for component, module in components.items():
            gradients[component].append(module.reference_gradients())
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
        assert_weights(module, fixture["after"][component], gradients[component])


def answer_loss(logits: torch.Tensor, step: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the answer's tokens, [A] and [EOS] included, each from the row before it."""
    column = torch.arange(logits.shape[1])
    start = step["query_lengths"][:, None]
    in_answer = (column >= start) & (column < start + step["answer_lengths"][:, None])
    return F.cross_entropy(logits[:, :-1][in_answer[:, 1:]], step["input_ids"][:, 1:][in_answer[:, 1:]])
