"""A whole model with the Triton kernels, on a CPU, against the same model without."""

from __future__ import annotations

import pytest
from model_samples import VARIANTS, joint_parameters, joint_pass, model_config, perturb, random_tokens

from rxt_dist.config import ModelConfig
from rxt_dist.kernels import triton_support
from rxt_dist.model import build_model


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(VARIANTS["moe"], id="moe"),
        pytest.param(VARIANTS["reverse"], id="reverse"),
        pytest.param(VARIANTS["gated-qk-norm"], id="qk-norm"),
        pytest.param(
            model_config(
                rope_layout="halves",
                decoder={"moe": {"num_experts": 4, "top_k": 2, "aux_loss": "switch", "z_loss_weight": 1.0}},
            ),
            id="halves-switch",
        ),
    ],
)
def test_a_model_computes_the_same(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both parts and with all gradients."""
    model = build_model(config, 0)
    perturb(model)
    passes = []
    for inside in (True, False):
        monkeypatch.setattr(triton_support, "interpreted", inside)
        model.zero_grad()
        layers, output, _ = joint_pass(model, random_tokens([6, 3]), [6, 3])
        loss = output.hidden.square().sum() + layers[-1].sum() + output.aux_sum
        (loss if output.z_sum is None else loss + output.z_sum).backward()
        gradients = [x.grad for x in joint_parameters(model).values() if x.grad is not None]
        passes.append([output.hidden.detach(), output.aux_sum.detach(), *gradients])
    assert len(passes[0]) > 30
    for ours, plain in zip(*passes, strict=True):
        assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max() + 1e-6
