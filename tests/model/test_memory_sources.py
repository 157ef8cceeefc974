"""Memory attention whose slots read gated means of layers: kernels in the interpreter, and operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.interpreter import interpreter  # noqa: F401
from memory_samples import LAYERS, LENGTHS, SLOTS, WIDTH, memory_config, network

from rxt_dist.kernels import memory_sources_triton, triton_support
from rxt_dist.model import MemoryAttention, SequenceLayout, memory_sources

GATES: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "activation": "sigmoid", "slot_status": "mean"},
    "one a lane": {"type": "linear", "per_slot": False},
    "static": {"type": "static"},
    "elementwise": {"type": "elementwise", "activation": "tanh", "per_slot": False},
}


def written(net: MemoryAttention, stm: torch.Tensor, present: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The memory after a write, what its gates did, and the gradients of the network's parameters."""
    torch.manual_seed(1)
    encoded = torch.randn(LAYERS, sum(LENGTHS), WIDTH)
    gates: dict[str, torch.Tensor] = {}
    net.zero_grad()
    after = net(stm, encoded, SequenceLayout.from_lengths(LENGTHS), present, gates)
    lanes = torch.ones(len(LENGTHS), dtype=torch.bool) if present is None else present
    assert torch.equal(after[:, ~lanes].nan_to_num(), stm[:, ~lanes].nan_to_num())
    (after * torch.randn(after.shape))[:, lanes].sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {"after": after[:, lanes].detach(), **gates, **gradients}  # type: ignore[dict-item]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("variant", ["self_interlayer", "grouped_self_interlayer"])
@pytest.mark.parametrize("everyone", [True, False])
def test_kernels_are_near_operators(
    interpreter: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    gate: str,
    variant: str,
    everyone: bool,
) -> None:
    monkeypatch.setattr(memory_sources_triton, "_CHUNKS", 3)
    net = network(memory_config(variant, gate=GATES[gate]))
    torch.manual_seed(0)
    stm = torch.randn(LAYERS, len(LENGTHS), SLOTS, WIDTH)
    stm[0, 0, 0] = 0.0
    stm[0, 1] = 2.0
    present = None
    if not everyone:
        present = torch.tensor([True, False, True])
        stm[1:, 1] = float("nan")
    calls = []
    kernels = memory_sources.mixed_rows
    monkeypatch.setattr(memory_sources, "mixed_rows", lambda *a: calls.append(1) or kernels(*a))
    found = written(net, stm, present)
    assert calls
    monkeypatch.setattr(triton_support, "interpreted", False)
    for name, exact in written(net, stm, present).items():
        assert (found[name] - exact).abs().max() <= 3e-6 * exact.abs().max().clamp_min(1e-6), name


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("fields", [{"norm": "rms"}, {"gate": {"type": "linear", "slot_status": "linear"}}])
def test_other_norms_and_gates_take_operators(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_sources, "norm_sums", None)
    net = network(memory_config("self_interlayer", **fields))
    assert torch.isfinite(written(net, torch.randn(LAYERS, len(LENGTHS), SLOTS, WIDTH), None)["after"]).all()
