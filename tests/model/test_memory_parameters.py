"""Parameters of the memory attention: which exist, what they start from; and the norms' running means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from memory_samples import LAYERS, LENGTHS, NORMS, SLOTS, VARIANTS, WIDTH, Inputs, memory_config
from torch import nn

from rxt_dist.model import MemoryAttention, build_model
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.memory_norm import MixedNorm
from rxt_dist.randomness import derive_key

HEAD = WIDTH // 4
ATTENTION = {"q.weight", "k.weight", "v.weight", "out.weight", "out.bias"}
LINEAR_GATE = {"linear.weight", "linear.bias"}


def under(**parts: set[str]) -> set[str]:
    return {f"{module}.{name}" for module, names in parts.items() for name in names}


SIMPLE = under(norm={"weight"}, input_norm={"weight"}, attention=ATTENTION)
INTERLAYER = under(mean_norm={"weight"}, interlayer_norm={"weight"}, interlayer_attention=ATTENTION)
SELF = under(self_norm={"weight"}, self_attention=ATTENTION)
GATES = {
    "simple": ("gate",),
    "self": ("gate", "self_gate"),
    "interlayer": ("gate", "interlayer_gate"),
    "self_interlayer": ("gate", "interlayer_gate", "source_gate"),
    "grouped_self_interlayer": ("gate", "interlayer_gate", "source_gate"),
}
OWN = {"simple": set(), "self": SELF}


def initialised(**fields: Any) -> MemoryAttention:
    net = MemoryAttention(memory_config(**fields))
    initialise(net, seed=3)
    return net


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_parameters_that_are_used(variant: str) -> None:
    plain = SIMPLE | OWN.get(variant, INTERLAYER)
    without = initialised(variant=variant, gate={"type": "off"}, gate_self_attention=False)
    assert set(dict(without.named_parameters())) == plain
    gated = initialised(variant=variant)
    expected = plain | under(**dict.fromkeys(GATES[variant], LINEAR_GATE))
    assert set(dict(gated.named_parameters())) == expected
    for name, parameter in gated.named_parameters():
        assert parameter.shape[0] == (1 if name.startswith("mean_norm") else LAYERS), name
        assert parameter.requires_grad, name
    assert not dict(gated.named_buffers())


@pytest.mark.parametrize(
    ("gate", "shapes"),
    [
        ({"type": "static"}, {"value": (LAYERS, SLOTS, 1)}),
        ({"type": "elementwise", "per_slot": False}, {"value": (LAYERS, 1)}),
        ({"type": "linear"}, {"linear.weight": (LAYERS, SLOTS, SLOTS), "linear.bias": (LAYERS, SLOTS)}),
        (
            {"type": "linear", "per_slot": False, "slot_status": "linear"},
            {
                "linear.weight": (LAYERS, 1, SLOTS),
                "linear.bias": (LAYERS, 1),
                "status.weight": (LAYERS, 1, WIDTH),
                "status.bias": (LAYERS, 1),
            },
        ),
        ({"type": "static", "slot_status": "linear"}, {"value": (LAYERS, SLOTS, 1)}),
    ],
)
def test_shapes_of_gates(gate: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    net = initialised(variant="simple", gate=gate)
    found = {name: tuple(parameter.shape) for name, parameter in net.gate.named_parameters()}
    assert found == shapes


def assert_uniform(x: torch.Tensor, fan_in: int) -> None:
    bound = 1 / math.sqrt(fan_in)
    assert x.abs().max() <= bound
    assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_initial_values() -> None:
    net = initialised(gate={"type": "linear", "slot_status": "linear"})
    for attention in (net.attention, net.interlayer_attention):
        for projection in (attention.q, attention.k, attention.v):
            assert_uniform(projection.weight, WIDTH)
        assert_uniform(attention.out.weight, 2 * HEAD)
        assert_uniform(attention.out.bias, 2 * HEAD)
    for gate in (net.gate, net.interlayer_gate, net.source_gate):
        assert_uniform(gate.linear.weight, SLOTS)
        assert_uniform(gate.linear.bias, SLOTS)
        assert_uniform(gate.status.weight, WIDTH)
        assert gate.status.bias.abs().max() <= 1 / math.sqrt(WIDTH)
    for norm in (net.norm, net.input_norm, net.mean_norm, net.interlayer_norm):
        assert (norm.weight == 1.0).all()


def test_configured_initial_values() -> None:
    biased = initialised(gate={"type": "linear", "bias_init": -3.0})
    assert all((gate.linear.bias == -3.0).all() for gate in (biased.gate, biased.source_gate))
    assert_uniform(biased.gate.linear.weight, SLOTS)
    static = initialised(gate={"type": "static", "init": 1.5})
    assert (static.gate.value == 1.5).all()
    gated = initialised(attention={"query_heads": 2, "kv_heads": 2, "gated": True, "qk_norm": True})
    assert abs(gated.attention.gate.weight.mean().item() - 1.0) < 0.01
    assert (gated.attention.key_norm.weight == 1.0).all()
    layer = initialised(norm="layer", norm_gate_init=-1.0).norm
    assert isinstance(layer, MixedNorm)
    assert (layer.gate == -1.0).all()
    assert (layer.scale == 1.0).all()
    assert (layer.weight == 1.0).all()
    assert not layer.bias.any()


def test_a_bias_of_minus_three_keeps_the_memory() -> None:
    net, inputs = (
        initialised(variant="simple", gate={"type": "linear", "bias_init": -3.0}),
        Inputs.random([3]),
    )
    gates: dict[str, torch.Tensor] = {}
    net(inputs.stm, inputs.encoded, inputs.layout, gates=gates)
    assert gates["gate"].mean().item() == pytest.approx(0.05, abs=0.03)


def test_each_layer_is_drawn_from_a_key_of_its_own() -> None:
    net = initialised()
    bound = 1 / math.sqrt(WIDTH)
    for layer in range(LAYERS):
        key = derive_key(3, "init", "interlayer_attention.k.weight", layer)
        generator = torch.Generator().manual_seed(key)
        expected = torch.empty(2 * HEAD, WIDTH).uniform_(-bound, bound, generator=generator)
        assert torch.equal(net.interlayer_attention.k.weight[layer], expected)


def test_initial_values_do_not_depend_on_build_order_or_neighbours() -> None:
    config = memory_config()
    model = build_model(config, seed=3)
    holder = nn.Module()
    holder.memory_attention = MemoryAttention(config)
    initialise(holder, seed=3)
    for name, parameter in holder.memory_attention.named_parameters():
        assert torch.equal(parameter, dict(model.memory_attention.named_parameters())[name]), name
    assert list(dict(model.named_children()))[-1] == "memory_attention"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_built_model_starts_with_running_means_of_one(variant: str, norm: str) -> None:
    model = build_model(memory_config(variant, norm=norm), seed=0)
    buffers = dict(model.memory_attention.named_buffers())
    assert bool(buffers) == (norm in ("adaptive", "positional"))
    assert all((buffer == 1.0).all() for buffer in buffers.values())


def mixed(norm: str, layers: int = LAYERS, decay: float = 0.75) -> MixedNorm:
    config = memory_config(norm=norm, norm_decay=decay).memory_attention
    built = MixedNorm(config, layers, SLOTS, WIDTH)
    initialise(built, seed=0)
    return built


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("norm", ["adaptive", "positional"])
def test_running_means_move_in_training_only(norm: str) -> None:
    module, x = mixed(norm), 3 * torch.randn(LAYERS, 2, SLOTS, WIDTH)
    module.eval()(x, None)
    assert (module.ema_rms == 1.0).all()
    module.train()(x, None)
    mean = root_mean_square(x).mean(dim=1)
    expected = 0.75 + 0.25 * (mean.mean(dim=1) if norm == "adaptive" else mean)
    torch.testing.assert_close(module.ema_rms, expected)
    module.reset_statistics()
    assert (module.ema_rms == 1.0).all()


def test_which_root_mean_square_divides() -> None:
    """In training both divide by the mean just updated; in evaluation only the positional norm does."""
    x = 3 * torch.randn(LAYERS, 2, SLOTS, WIDTH)
    share = torch.sigmoid(torch.tensor(-2.0))
    for norm, training in (
        ("adaptive", True),
        ("adaptive", False),
        ("positional", True),
        ("positional", False),
    ):
        module = mixed(norm)
        module.ema_rms.fill_(4.0)
        out = module.train(training)(x, None)
        running = module.ema_rms[:, None] if norm == "positional" else module.ema_rms[:, None, None]
        rms = root_mean_square(x) if (norm, training) == ("adaptive", False) else running
        assert training == bool((module.ema_rms != 4.0).any())
        torch.testing.assert_close(out, share * x / rms.sqrt() + (1 - share) * x)


@pytest.mark.parametrize("norm", ["adaptive", "positional"])
def test_absent_lanes_do_not_count_in_running_means(norm: str) -> None:
    x = torch.randn(LAYERS, 3, SLOTS, WIDTH)
    some, alone, none = mixed(norm), mixed(norm), mixed(norm)
    some(x, torch.tensor([True, False, True]))
    alone(x[:, [0, 2]], None)
    torch.testing.assert_close(some.ema_rms, alone.ema_rms)
    none(x, torch.zeros(3, dtype=torch.bool))
    none(x[:, :0], None)
    assert (none.ema_rms == 1.0).all()


@pytest.mark.parametrize("norm", ["adaptive", "positional"])
def test_a_shared_norm_counts_all_groups(norm: str) -> None:
    module, x = mixed(norm, layers=1), torch.randn(2, 3, SLOTS, WIDTH)
    assert module(x, None).shape == x.shape
    mean = root_mean_square(x).mean(dim=(0, 1))
    expected = 0.75 + 0.25 * (mean.mean() if norm == "adaptive" else mean)
    torch.testing.assert_close(module.ema_rms[0], expected.expand_as(module.ema_rms[0]))


@pytest.mark.parametrize("norm", NORMS[1:])
def test_a_memory_of_zeros_has_finite_gradients(norm: str) -> None:
    module, x = mixed(norm), torch.zeros(LAYERS, 1, SLOTS, WIDTH, requires_grad=True)
    module(x, None).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_running_means_are_part_of_the_state() -> None:
    net = initialised(norm="adaptive")
    inputs = Inputs.random(LENGTHS)
    net.train()(inputs.stm, inputs.encoded, inputs.layout)
    other = initialised(norm="adaptive")
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.mean_norm.ema_rms, net.mean_norm.ema_rms)
    assert (net.mean_norm.ema_rms != 1.0).all()
