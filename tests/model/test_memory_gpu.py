"""Memory attention on a CUDA device in bf16, against fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from memory_samples import LAYERS, NORMS, SLOTS, VARIANTS, WIDTH, memory_config, network

from rxt_dist.kernels.attention import set_attention_backend
from rxt_dist.kernels.compilation import set_compile
from rxt_dist.model import SequenceLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [300, 1, 70, 128]


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    torch.compiler.reset()
    set_attention_backend("auto", torch.device("cuda"), torch.bfloat16)
    yield
    set_compile(False)
    torch.compiler.reset()
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_on_cuda_is_near_fp32_and_never_waits_for_the_device(variant: str, norm: str) -> None:
    # Flash attention wants head widths that are multiples of 8.
    config = memory_config(variant, norm=norm, heads=2, self_attention=None, interlayer_attention=None)
    generator = torch.Generator().manual_seed(0)
    stm = torch.randn(LAYERS, len(LENGTHS), SLOTS, WIDTH, generator=generator)
    encoded = torch.randn(LAYERS, sum(LENGTHS), WIDTH, generator=generator)
    present = torch.tensor([True, True, False, True])
    layout = SequenceLayout.from_lengths(LENGTHS)
    half = network(config).to("cuda", torch.bfloat16)
    on_device = stm.cuda().requires_grad_()
    device_encoded, device_present = encoded.cuda().bfloat16().requires_grad_(), present.cuda()
    device_layout = layout.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for training in (True, False):
            half.train(training)
            after = half(on_device, device_encoded, device_layout, device_present)
            after.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
    exact = network(config)
    exact.load_state_dict({name: value.float().cpu() for name, value in half.state_dict().items()})
    expected = exact(stm, encoded, layout, present)
    assert after.dtype == torch.float32
    assert (after.cpu() - expected).abs().max() < 0.03 * expected.abs().max()
    assert torch.equal(after[:, 2].cpu(), stm[:, 2])
    for name, parameter in half.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_a_memory_without_gradient_on_cuda_is_near_fp32(compiles: bool, activation: str) -> None:
    gate = {"type": "linear", "activation": activation, "slot_status": "mean"}
    config = memory_config("grouped_self_interlayer", gate=gate, heads=2)
    torch.manual_seed(0)
    stm = torch.randn(LAYERS, len(LENGTHS), SLOTS, WIDTH)
    encoded = torch.randn(LAYERS, sum(LENGTHS), WIDTH)
    factor, present = torch.randn(stm.shape), torch.tensor([True, True, False, True])
    stm[:, 2] = float("nan")
    layout = SequenceLayout.from_lengths(LENGTHS)
    half = network(config).to("cuda", torch.bfloat16).train()
    exact = network(config).train()
    exact.load_state_dict({name: value.float().cpu() for name, value in half.state_dict().items()})
    assert half._has_kernels(stm.cuda())
    found = []
    set_compile(compiles)
    for net, device in ((half, "cuda"), (half, "cuda"), (exact, "cpu")):
        net.zero_grad()
        inputs = (stm.to(device), encoded.to(device, net.attention.dtype), layout.to(device))
        if device == "cpu":
            set_compile(False)
            set_attention_backend("sdpa", torch.device("cpu"), torch.float32)
        after = net(*inputs, present.to(device))
        (after * factor.to(device))[:, present.to(device)].sum().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        found.append([after[:, present].detach(), *(x for x in gradients if x is not None)])
    for ours, same, expected in zip(*found, strict=True):
        assert torch.equal(ours, same)
        assert (ours.float().cpu() - expected).norm() <= 0.03 * expected.norm()
