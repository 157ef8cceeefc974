"""The count of operations against PyTorch's own, which watches the products that a step really makes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.lanes import MemoryPieces, lane_config, lane_model, lane_module, random_conversations, windows
from stage_samples import batch_of, run_config, sample_model
from torch.utils.flop_counter import FlopCounterMode

from rxt_dist.config.stage import ANSWER_STAGES
from rxt_dist.kernels import attention as attention_kernel
from rxt_dist.kernels import cross_entropy, grouped_gemm
from rxt_dist.kernels.attention import AttentionLayout
from rxt_dist.model import moe
from rxt_dist.stages import StageModule, build_stage
from rxt_dist.stages.flops import batch_flops

MICRO_MOE = "model.decoder.moe"
TEXT = {
    "plain": [],
    "causal_cross": ["model.decoder.causal_cross=true", "model.encoder.activation=gelu"],
    "encoder": ["stages=[{name: joint_lm, steps: 2, components: encoder}]"],
    "decoder": ["stages=[{name: joint_lm, steps: 2, components: decoder}]"],
    "decoder_causal": [
        "stages=[{name: joint_lm, steps: 2, components: decoder}]",
        "model.decoder.causal_cross=true",
    ],
    "sft": ["stages=[{name: interaction_sft, steps: 2}]"],
    "dense": [f"{MICRO_MOE}=null", "model.decoder.gated_ff=false", "model.decoder.stm_norm=false"],
    "stateless": [
        "model.decoder.stateless_layers=[dense, moe]",
        "model.decoder.final_stateless_layers=[moe]",
        "model.decoder.dense_layer_dim=48",
        f"{MICRO_MOE}.num_shared_experts=2",
        f"{MICRO_MOE}.shared_expert_dim=24",
        "model.decoder.head_norm=rms",
        "model.decoder.attention={query_heads: 2, kv_heads: 4, gated: true, qk_norm: true}",
        "model.decoder.cross_attention={query_heads: 2, kv_heads: 1, output_bias: false, gated: true}",
    ],
}
MEMORY = "{name: memory_attention, steps: 4}"
LANES: dict[str, dict[str, Any]] = {
    "memory": {"stage": MEMORY},
    "memory_reference": {"stage": "{name: memory_attention, steps: 4, unused_slots: reference}"},
    "memory_recomputed": {"stage": MEMORY},
    "simple": {
        "stage": MEMORY,
        "model__memory_attention": "{variant: simple, heads: 4, residual: false, "
        "gate: {type: off}, input_norm: false, attention: {query_heads: 4, kv_heads: 2}}",
    },
    "self": {
        "model__memory_attention": "{variant: self, heads: 4, gate_self_attention: true, "
        "self_attention: {query_heads: 2, kv_heads: 4}, "
        "attention: {query_heads: 4, kv_heads: 2, gated: true}, "
        "gate: {per_slot: false, slot_status: linear}}",
    },
    "interlayer": {"model__memory_attention__variant": "interlayer"},
    "grouped": {
        "model__memory_attention__variant": "grouped_self_interlayer",
        "model__memory_attention__num_groups": 2,
        "model__memory_attention__gate": "{type: elementwise, bias_init: null}",
    },
    "smat": {},
    "smat_frozen_encoder": {"stage": "{name: smat, steps: 4, frozen: [encoder]}"},
    "smat_frozen_memory": {"stage": "{name: smat, steps: 4, frozen: [memory_attention]}"},
    "smat_decoder_only": {"stage": "{name: smat, steps: 4, frozen: [encoder, memory_attention]}"},
    "smat_frozen_decoder": {"stage": "{name: smat, steps: 4, frozen: [decoder]}"},
    "smat_memory_only": {"stage": "{name: smat, steps: 4, frozen: [decoder, encoder]}"},
    "smat_later_decoder": {"stage": "{name: smat, steps: 4, unfreeze: {decoder: 2}}"},
    "smat_causal": {"model__decoder__causal_cross": True},
    "context": {"stage": "{name: context_sft, steps: 4}"},
}


def visible_pairs_only(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float
) -> torch.Tensor:
    """Attention query by query, each with the keys that it sees and no others."""
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    found = []
    bounds = zip(pairwise(layout.cu_q.tolist()), pairwise(layout.cu_k.tolist()), strict=True)
    for (first, last), (start, end) in bounds:
        for row in range(first, last):
            seen = slice(start, end - (last - 1 - row) if causal else end)
            query = q[row].unsqueeze(1)  # [H, 1, d]
            share = (torch.bmm(query, k[seen].permute(1, 2, 0)) * scale).softmax(-1)
            found.append(torch.bmm(share, v[seen].transpose(0, 1)).squeeze(1))
    return torch.stack(found)


@pytest.fixture(autouse=True)
def _plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that PyTorch's counter knows, of exactly the rows and pairs that exist."""
    monkeypatch.setattr(attention_kernel, "_backend", visible_pairs_only)
    monkeypatch.setattr(attention_kernel, "set_attention_backend", lambda *_: "sdpa")
    monkeypatch.setattr(grouped_gemm, "_fits_grouped_mm", lambda *_: False)
    # Nor do products count that are made with zeros for the sake of alignment.
    monkeypatch.setattr(moe._AlignedLinear, "forward", torch.nn.Linear.forward)


def added_product(_: Any, left: torch.Size, right: torch.Size, **__: Any) -> int:
    """``total.addmm_(left, right)``, the only product here that PyTorch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


@dataclass
class Early:
    """Operations that the loss of a head does in the forward pass for the backward pass."""

    gradients: int = 0
    of_bias: int = 0
    """Of the columns of ones, whose products are a sum."""


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Early:
    found = Early()
    add = cross_entropy.ProjectionGradients.add

    def counted(
        self: cross_entropy.ProjectionGradients, part: slice, gradient: torch.Tensor, repeated: int
    ) -> None:
        with counter() as inside:
            add(self, part, gradient, repeated)
        found.gradients += inside.get_total_flops()
        if self.parameters is not None:
            found.of_bias += 2 * gradient.numel() * (self.parameters.shape[1] - self._weight.shape[1])

    monkeypatch.setattr(cross_entropy.ProjectionGradients, "add", counted)
    return found


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})


def measured(module: StageModule, early: Early, *inputs: Any) -> tuple[int, int]:
    """Operations of the forward and of the backward pass, as PyTorch counts them; without those of ones."""
    with counter() as forward:
        loss, _, _ = module(*inputs)
    with counter() as backward:
        loss.backward()
    passes = forward.get_total_flops() - early.gradients, backward.get_total_flops() + early.gradients
    return passes[0], passes[1] - early.of_bias


@pytest.mark.parametrize("overrides", TEXT.values(), ids=TEXT)
def test_text_stages(overrides: list[str], early: Early) -> None:
    config = run_config(*overrides)
    stage = config.stages[0]
    module = build_stage(sample_model(config), config, stage)
    module.freeze()
    batch = batch_of([0, 1, 2, 3, 4, 5])
    counted = batch_flops(config, stage, batch, module.trains)
    assert batch.masked_index.numel() > 5
    forward, backward = measured(module, early, batch, module.local_counts(batch), None)
    assert early.gradients > early.of_bias > 0
    assert (counted.forward, counted.backward) == (forward, backward)


@pytest.mark.parametrize(("settings", "window"), [(s, w) for s in LANES.values() for w in (1, 3)],
                         ids=[f"{name}-{w}" for name in LANES for w in (1, 3)])  # fmt: skip
def test_lane_stages(
    settings: dict[str, Any], window: int, early: Early, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.lanes.set_attention_backend", lambda *_: None)
    config = lane_config(**settings)
    stage = config.stages[0]
    model = lane_model(config)
    module = lane_module(config, model)
    source = MemoryPieces(random_conversations([2, 3, 1, 4, 2, 5]))
    with windows(source, window=window, look_back=stage.name in ANSWER_STAGES) as steps:
        step = next(steps)
    batch = step.batches[0]
    stm = torch.zeros(config.model.decoder.num_layers, 4, config.model.stm_size, config.model.embed_dim)
    counted = batch_flops(config, stage, batch, module.trains)
    forward, backward = measured(module, early, batch, step.counts, stm)
    assert (early.gradients > 0) == (stage.name in ANSWER_STAGES)
    assert (counted.forward, counted.backward) == (forward, backward)
