"""Memory attention: stacked layers against a loop, lanes against each other, absence, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_samples import (
    LAYERS,
    LENGTHS,
    NORMS,
    SLOTS,
    VARIANTS,
    WIDTH,
    Inputs,
    gradients,
    loop,
    memory_config,
    network,
)

from rxt_dist.interchange import reference_of
from rxt_dist.model import MemoryAttention, SequenceLayout
from rxt_dist.model.memory_attention import GateValues, MemoryGroups, gate_statistics

GATES: dict[str, dict[str, Any]] = {
    "off": {"type": "off"},
    "static": {"type": "static", "init": 0.5},
    "elementwise": {"type": "elementwise", "activation": "tanh"},
    "linear": {"type": "linear"},
}
GATE_OPTIONS: dict[str, dict[str, Any]] = {
    "static-shared-tanh": {"type": "static", "init": 0.5, "per_slot": False, "activation": "tanh"},
    "elementwise-shared": {"type": "elementwise", "per_slot": False},
    "linear-tanh": {"type": "linear", "activation": "tanh"},
    "linear-status": {"type": "linear", "slot_status": "linear"},
    "linear-shared": {"type": "linear", "per_slot": False},
    "linear-shared-status-tanh": {
        "type": "linear",
        "per_slot": False,
        "slot_status": "linear",
        "activation": "tanh",
    },
}
HEADS: dict[str, dict[str, Any]] = {
    "grouped-query": {"query_heads": 4, "kv_heads": 2},
    "reverse": {"query_heads": 2, "kv_heads": 4},
    "unbiased": {"query_heads": 1, "kv_heads": 1, "output_bias": False},
    "gated-qk-norm": {"query_heads": 2, "kv_heads": 2, "gated": True, "qk_norm": True},
}


def assert_equals_the_loop(net: MemoryAttention, lengths: list[int]) -> None:
    """Values and every gradient, in fp64, where only the fp32 angles are inexact."""
    net, inputs = net.double(), Inputs.random(lengths, torch.float64)
    factor = torch.randn(LAYERS, len(lengths), SLOTS, WIDTH, dtype=torch.float64)
    ours, expected = net(inputs.stm, inputs.encoded, inputs.layout), loop(net, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    exact = gradients(net, inputs, (expected * factor).sum())
    for name, gradient in gradients(net, inputs, (ours * factor).sum()).items():
        error = (gradient - exact[name]).abs().max()
        assert error <= 2e-6 * exact[name].abs().max() + 1e-9, name
        # The softmax over a single token does not depend on the query.
        assert exact[name].any() or max(lengths) == 1, name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stacked_layers_equal_a_loop(variant: str, gate: str, norm: str) -> None:
    config = memory_config(variant, gate=GATES[gate], norm=norm)
    assert_equals_the_loop(network(config), LENGTHS)


@pytest.mark.parametrize("gate", GATE_OPTIONS)
@pytest.mark.parametrize("variant", ["self", "grouped_self_interlayer"])
def test_gate_options_equal_a_loop(variant: str, gate: str) -> None:
    assert_equals_the_loop(network(memory_config(variant, gate=GATE_OPTIONS[gate])), LENGTHS)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("variant", ["self", "interlayer"])
def test_head_counts_and_options_equal_a_loop(variant: str, heads: str) -> None:
    choice = {"attention": HEADS[heads], "interlayer_attention": None, "self_attention": None}
    assert_equals_the_loop(network(memory_config(variant, **choice)), LENGTHS)


@pytest.mark.parametrize("norm", ["rms", "positional"])
def test_one_scale_a_channel_equals_a_loop(norm: str) -> None:
    assert_equals_the_loop(network(memory_config(norm=norm, norm_per_dim_scale=True)), LENGTHS)


def test_without_residual_the_update_replaces_the_memory() -> None:
    config = memory_config("simple", residual=False, gate={"type": "off"})
    assert_equals_the_loop(network(config), LENGTHS)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 5], [2, 9], [40, 1]])
def test_any_lengths_equal_a_loop(lengths: list[int]) -> None:
    assert_equals_the_loop(network(memory_config()), lengths)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[0], [], [3, 0]])
def test_lanes_without_tokens(variant: str, lengths: list[int]) -> None:
    net, inputs = network(memory_config(variant)), Inputs.random(lengths)
    after = net(inputs.stm, inputs.encoded, inputs.layout)
    assert after.shape == inputs.stm.shape
    for name, gradient in gradients(net, inputs, after.sum()).items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_lanes_do_not_see_each_other(variant: str) -> None:
    net, inputs = network(memory_config(variant)), Inputs.random(LENGTHS)
    before = net(inputs.stm, inputs.encoded, inputs.layout)
    for lane in range(len(LENGTHS)):
        alone = inputs.lane(lane)
        own = net(alone.stm, alone.encoded, alone.layout)
        torch.testing.assert_close(own, before[:, lane : lane + 1], rtol=1e-5, atol=1e-6)
        of_stm, of_encoded = torch.autograd.grad(
            before[:, lane].square().sum(), (inputs.stm, inputs.encoded), retain_graph=True
        )
        reached = [b for b in range(len(LENGTHS)) if of_stm[:, b].any()]
        tokens = inputs.layout.sequence_ids[of_encoded.abs().sum(dim=(0, 2)) > 0]
        assert reached == [lane]
        assert tokens.tolist() == [lane] * LENGTHS[lane]


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_lanes_is_irrelevant(variant: str) -> None:
    net, inputs = network(memory_config(variant)), Inputs.random(LENGTHS)
    order = [2, 0, 1]
    rows = torch.cat([torch.nonzero(inputs.layout.sequence_ids == lane)[:, 0] for lane in order])
    layout = SequenceLayout.from_lengths([LENGTHS[lane] for lane in order])
    straight = net(inputs.stm, inputs.encoded, inputs.layout)
    shuffled = net(inputs.stm[:, order], inputs.encoded[:, rows], layout)
    torch.testing.assert_close(shuffled, straight[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_lanes_are_untouched_whatever_they_hold(variant: str, norm: str) -> None:
    net, inputs = network(memory_config(variant, norm=norm)), Inputs.random(LENGTHS)
    present = torch.tensor([True, False, True])
    with torch.no_grad():
        inputs.encoded[:, inputs.layout.sequence_ids == 1] = torch.nan
        inputs.stm[:, 1, 0] = torch.inf
    after = net(inputs.stm, inputs.encoded, inputs.layout, present)
    assert torch.equal(after[:, 1], inputs.stm[:, 1])
    ours = gradients(net, inputs, after[:, present].square().sum() + 3.0 * after[:, 1].sum())
    assert (ours["stm"][:, 1] == 3.0).all()
    assert not ours["encoded"][:, inputs.layout.sequence_ids == 1].any()
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for lane in (0, 2):
        alone = inputs.lane(lane)
        own = net(alone.stm, alone.encoded, alone.layout)
        torch.testing.assert_close(after[:, lane : lane + 1], own, rtol=1e-5, atol=1e-6)
        found = gradients(net, alone, own.square().sum())
        torch.testing.assert_close(ours["stm"][:, lane : lane + 1], found["stm"], rtol=1e-4, atol=1e-5)
        for name, total in expected.items():
            total += found[name]
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-5, name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_also_when_no_lane_is_present(variant: str, norm: str) -> None:
    net, inputs = network(memory_config(variant, norm=norm)).train(), Inputs.random(LENGTHS)
    after = net(inputs.stm, inputs.encoded, inputs.layout, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(after, inputs.stm)
    after.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_all_present_is_the_same_as_unsaid() -> None:
    net, inputs = network(memory_config()), Inputs.random(LENGTHS)
    said = net(inputs.stm, inputs.encoded, inputs.layout, torch.ones(3, dtype=torch.bool))
    assert torch.equal(said, net(inputs.stm, inputs.encoded, inputs.layout))


def test_position_and_order_of_tokens_matter() -> None:
    net, inputs = network(memory_config("simple")), Inputs.random([3])
    shuffled = net(inputs.stm, inputs.encoded[:, [1, 0, 2]], inputs.layout)
    assert (net(inputs.stm, inputs.encoded, inputs.layout) - shuffled).abs().max() > 1e-3


def test_hidden_keys_of_a_layout_are_hidden_from_the_memory() -> None:
    """A layout may hold positions that attention must not see, as padded published batches do."""
    config = memory_config()
    net, inputs = network(config), Inputs.random(LENGTHS)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    padded = torch.randn(LAYERS, 3, 9, WIDTH)
    padded[:, mask] = inputs.encoded.detach()
    torch.testing.assert_close(
        reference_of(net, config).forward_padded(padded, mask, inputs.stm),
        net(inputs.stm, inputs.encoded, inputs.layout),
        rtol=1e-5,
        atol=1e-6,
    )


def test_groups_are_built_once_for_a_layout() -> None:
    layout = SequenceLayout.from_lengths(LENGTHS)
    groups = MemoryGroups.of(layout, LAYERS, SLOTS)
    assert MemoryGroups.of(layout, LAYERS, SLOTS) is groups
    assert MemoryGroups.of(layout, LAYERS, SLOTS + 1) is not groups
    assert groups.tokens.cu_k.dtype == torch.int32
    assert groups.tokens.cu_k.tolist()[:5] == [0, 7, 8, 11, 18]
    assert groups.tokens.cu_k.tolist()[-1] == LAYERS * 11
    assert groups.tokens.cu_q.tolist() == [SLOTS * i for i in range(LAYERS * 3 + 1)]
    assert (groups.tokens.max_q, groups.tokens.max_k) == (SLOTS, 7)


@pytest.mark.parametrize("norm", ["classic_rms", "adaptive"])
def test_two_writes_in_one_graph(norm: str) -> None:
    """A window writes several times before its backward pass; the running means move meanwhile."""
    net = network(memory_config(norm=norm)).train()
    inputs, second = Inputs.random(LENGTHS), Inputs.random([2, 6, 4], seed=6)
    middle = net(inputs.stm, inputs.encoded, inputs.layout)
    after = net(middle, second.encoded, second.layout)
    for name, gradient in gradients(net, inputs, after.square().sum()).items():
        assert gradient.any(), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_stays_close_to_fp32(variant: str, norm: str) -> None:
    net, inputs = network(memory_config(variant, norm=norm)), Inputs.random(LENGTHS)
    exact = net(inputs.stm, inputs.encoded, inputs.layout)
    net.to(torch.bfloat16)
    whole = net(inputs.stm.bfloat16(), inputs.encoded.bfloat16(), inputs.layout)
    assert whole.dtype == torch.bfloat16
    mixed = net(inputs.stm, inputs.encoded.bfloat16(), inputs.layout)
    assert mixed.dtype == torch.float32
    for ours, tolerance in ((whole, 0.04), (mixed, 0.02)):
        assert (ours.float() - exact).abs().max() <= tolerance * exact.abs().max()
    mixed.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_small_updates_accumulate_in_an_fp32_memory_with_bf16_weights() -> None:
    """An update of a share of 1e-4 is lost in a bf16 memory, not in an fp32 one."""
    net = network(memory_config("simple", gate={"type": "static", "init": -9.2})).to(torch.bfloat16)
    inputs = Inputs.random(LENGTHS)
    after = net(inputs.stm, inputs.encoded, inputs.layout)
    moved = (after - inputs.stm).abs()
    assert (moved > 0).float().mean() > 0.95
    assert moved.max() < 1e-3


@pytest.mark.parametrize(
    ("stm", "encoded", "message"),
    [
        (
            (LAYERS, 2, SLOTS, WIDTH),
            (LAYERS, 11, WIDTH),
            r"stm: found shape \(4, 2, 5, 16\)",
        ),
        ((LAYERS, 3, 6, WIDTH), (LAYERS, 11, WIDTH), r"stm: .*expected \(4, 3, 5, 16\)"),
        ((LAYERS, 3, SLOTS, WIDTH), (LAYERS, 12, WIDTH), r"encoded: .*\(4, 12, 16\); expected \(4, 11, 16\)"),
        ((LAYERS, 3, SLOTS, WIDTH), (1, 11, WIDTH), r"encoded: found shape \(1, 11, 16\)"),
    ],
)
def test_wrong_shapes(stm: tuple[int, ...], encoded: tuple[int, ...], message: str) -> None:
    net = network(memory_config())
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(stm), torch.zeros(encoded), SequenceLayout.from_lengths(LENGTHS))


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("simple", {"gate"}),
        ("self", {"gate", "self_gate"}),
        ("interlayer", {"gate", "interlayer_gate"}),
        ("grouped_self_interlayer", {"gate", "interlayer_gate", "source_gate"}),
    ],
)
def test_gate_statistics(variant: str, names: set[str]) -> None:
    net, inputs = network(memory_config(variant)), Inputs.random(LENGTHS)
    gates: GateValues = {}
    net(inputs.stm, inputs.encoded, inputs.layout, gates=gates)
    assert set(gates) == names
    assert all(value.shape == (LAYERS, 3, SLOTS, 1) for value in gates.values())
    assert not any(value.requires_grad for value in gates.values())
    found = gate_statistics(gates)
    assert set(found) == {f"{name}_{kind}" for name in names for kind in ("mean", "std")}
    torch.testing.assert_close(found["gate_mean"], gates["gate"].mean())
    torch.testing.assert_close(found["gate_std"], gates["gate"].std(correction=0))
    some = gate_statistics(gates, torch.tensor([True, False, True]))
    torch.testing.assert_close(some["gate_mean"], gates["gate"][:, [0, 2]].mean())
    torch.testing.assert_close(some["gate_std"], gates["gate"][:, [0, 2]].std(correction=0))
    assert gate_statistics(gates, torch.zeros(3, dtype=torch.bool))["gate_mean"] == 0


def test_statistics_of_a_static_gate() -> None:
    inputs, gates = Inputs.random(LENGTHS), GateValues()
    net = network(memory_config("simple", gate={"type": "static", "init": -3.0}))
    net(inputs.stm, inputs.encoded, inputs.layout, gates=gates)
    value = net.gate.value.detach().sigmoid()
    for present in (None, torch.tensor([True, False, True])):
        found = gate_statistics(gates, present)
        torch.testing.assert_close(found["gate_mean"], value.mean())
        torch.testing.assert_close(found["gate_std"], value.std(correction=0))


def test_without_gates_there_are_no_statistics() -> None:
    inputs, gates = Inputs.random(LENGTHS), GateValues()
    net = network(memory_config(gate={"type": "off"}))
    net(inputs.stm, inputs.encoded, inputs.layout, gates=gates)
    assert not gate_statistics(gates)
