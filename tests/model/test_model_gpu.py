"""The whole model in bf16 on a CUDA device, against fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from model_samples import SYMMETRIC, joint_parameters, joint_pass, model_config, perturb, random_tokens

from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.model import Memory, SequenceLayout, build_model
from rxt_dist.model.moe import MoE
from rxt_dist.stages.expert_balance import ExpertBalance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [1200, 1, 500, 64]  # more rows than the small-input kernels take
CONFIG = model_config(
    embed_dim=64,
    decoder={"attention": {"query_heads": 4, "kv_heads": 2}, "cross_attention": {**SYMMETRIC, "gated": True}},
)
BALANCED = {
    "num_experts": 4,
    "top_k": 2,
    "aux_loss": "switch",
    "z_loss_weight": 0.001,
    "bias_update_rate": 0.001,
}


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    set_attention_backend("auto", torch.device("cuda"), torch.bfloat16)
    yield
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)


def test_bf16_on_cuda_is_near_fp32_and_never_waits_for_the_device() -> None:
    model = build_model(CONFIG, seed=0)
    perturb(model)
    tokens = random_tokens(LENGTHS)
    half = build_model(CONFIG, seed=0)
    perturb(half)
    half.to("cuda", torch.bfloat16)
    device_tokens = tokens.cuda()
    layout = SequenceLayout.from_lengths(LENGTHS).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers = half.encoder(device_tokens, layout)
        output = half.decoder(device_tokens, layout, Memory.of_sequence(layers, layout))
        (output.hidden.float().pow(2).sum() + output.aux_sum).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    exact, exact_output, _ = joint_pass(model, tokens, LENGTHS)
    assert (layers.float().cpu() - exact).abs().max() < 0.05 * exact.abs().max()
    assert abs(output.aux_sum.item() - exact_output.aux_sum.item()) < 0.02 * exact_output.aux_sum.item()
    for key, parameter in joint_parameters(half).items():
        if not key.startswith("mlm_head") and not key.startswith("decoder.lm_head"):
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key


def test_balanced_experts_never_wait_for_the_device() -> None:
    """Losses, counts, shares and biases of two steps; reading one of them would be an error."""
    config = model_config(embed_dim=64, decoder={"moe": BALANCED})
    model = build_model(config, seed=0)
    perturb(model)
    model.to("cuda", torch.bfloat16)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, MoE)}
    balance = ExpertBalance(layers)
    tokens, layout = random_tokens(LENGTHS).cuda(), SequenceLayout.from_lengths(LENGTHS).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            balance.begin_step()
            encoded = model.encoder(tokens, layout)
            output = model.decoder(tokens, layout, Memory.of_sequence(encoded, layout))
            (output.hidden.float().pow(2).sum() + output.aux_sum + output.z_sum).backward()
            balance.end_step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            output.z_sum.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, layer in layers.items():
        assert layer.router.selection_bias is not None
        assert layer.router.selection_bias.dtype == torch.float32
        assert layer.router.selection_bias.any()
        assert layer.loads is not None
        assert layer.loads.sum().item() == sum(LENGTHS) * 2
        torch.testing.assert_close(balance.shares()[name], layer.loads.float() / layer.loads.sum())
        assert layer.router.proj.weight.grad is not None
        assert torch.isfinite(layer.router.proj.weight.grad).all()
