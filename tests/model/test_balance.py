"""Losses that balance experts, and routing with a selection bias, against loops over tokens and experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_samples import joint_pass, model_config, perturb, random_tokens

from rxt_dist.config import MoEConfig
from rxt_dist.model import build_model
from rxt_dist.model.balance import bias_direction, count_experts, load_shares, switch_loss, z_loss
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import MoE, Router

E, D, N = 5, 16, 9


def layer(**fields: Any) -> MoE:
    config = MoEConfig(**{"num_experts": E, "top_k": 2, **fields})
    moe = MoE(config, D, 12, gated=True, activation="silu")
    initialise(moe, seed=1)
    perturb(moe)
    with torch.no_grad():
        moe.router.proj.weight.mul_(3)
    return moe


def rows(count: int = N) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(4))


def probabilities_of(moe: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.softmax(moe.router.proj.weight @ row, dim=0) for row in x]


def largest(values: torch.Tensor, count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -float(values[e]))[:count]


def switch_by_loop(moe: MoE, x: torch.Tensor, shares: list[float] | None = None) -> torch.Tensor:
    """Equations 4 to 6 of the Switch Transformer, with K choices a token, times the number of tokens."""
    found, chosen = probabilities_of(moe, x), [0] * E
    for one in found:
        for expert in largest(one.detach(), moe.config.top_k):
            chosen[expert] += 1
    total = torch.zeros(())
    for expert in range(E):
        share = chosen[expert] / sum(chosen) if shares is None else shares[expert]
        total = total + share * sum(one[expert] for one in found)
    return E * total


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_switch_loss_of_a_pass(top_k: int) -> None:
    """Value and gradient; with several shared experts their gate is not in it."""
    moe = layer(aux_loss="switch", top_k=top_k, num_shared_experts=2)
    expected = switch_by_loop(moe, rows())
    (wanted,) = torch.autograd.grad(expected, moe.router.proj.weight)
    found = moe(rows())[1]
    (gradient,) = torch.autograd.grad(found.balance, moe.router.proj.weight)
    torch.testing.assert_close(found.balance, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert found.z is None
    assert wanted.abs().max() > 0.1 or top_k == E


def test_switch_loss_in_training_takes_the_shares_it_is_given() -> None:
    moe = layer(aux_loss="switch")
    given = [0.4, 0.1, 0.3, 0.05, 0.15]
    moe.shares = torch.tensor(given)
    torch.testing.assert_close(moe(rows())[1].balance, switch_by_loop(moe, rows(), given))
    moe.eval()
    torch.testing.assert_close(moe(rows())[1].balance, switch_by_loop(moe, rows()))


def test_switch_loss_sees_the_load_where_the_reference_value_does_not() -> None:
    """All tokens sure of the same expert, and of different ones."""
    sure = torch.eye(E).repeat(2, 1)
    even = switch_loss(sure, load_shares(count_experts(sure.argmax(1), E)))
    same = torch.eye(E)[:1].repeat(2 * E, 1)
    uneven = switch_loss(same, load_shares(count_experts(same.argmax(1), E)))
    assert even.item() / (2 * E) == pytest.approx(1.0)
    assert uneven.item() / (2 * E) == pytest.approx(E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss(dtype: torch.dtype) -> None:
    moe = layer(aux_loss="none", z_loss_weight=0.5).to(dtype)
    x = rows().to(dtype)
    logits = moe.router.proj(x)[:, :E].detach()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist())
    found = moe(x)[1]
    assert found.balance is None
    assert found.z.dtype == torch.float32
    assert found.z.item() == pytest.approx(expected, rel=1e-5)
    logits = logits.float().requires_grad_()
    z_loss(logits).backward()
    for row, gradient in zip(logits.detach(), logits.grad, strict=True):
        total = sum(math.exp(v) for v in row.tolist())
        for value, slope in zip(row.tolist(), gradient.tolist(), strict=True):
            assert slope == pytest.approx(2 * math.log(total) * math.exp(value) / total, rel=1e-4)


def test_no_tokens_have_no_losses() -> None:
    moe = layer(aux_loss="switch", z_loss_weight=1.0)
    sums = moe(rows(0))[1]
    assert [value.item() for value in sums] == [0.0, 0.0]
    (sums.balance + sums.z).backward()
    assert not moe.router.proj.weight.grad.any()


def test_the_bias_chooses_and_does_not_weigh() -> None:
    moe = layer(bias_update_rate=0.0)
    plain = layer()
    bias = torch.tensor([0.0, 0.5, -0.6, 0.1, 0.3])
    moe.router.selection_bias.copy_(bias)
    x = rows().requires_grad_()
    routing = moe.router(x)
    moved = 0
    for one, weights, experts in zip(probabilities_of(moe, x), routing.weights, routing.experts, strict=True):
        chosen = largest(one.detach() + bias, 2)
        assert experts.tolist() == chosen
        moved += chosen != largest(one.detach(), 2)
        mass = sum(one[e] for e in chosen)
        torch.testing.assert_close(weights, torch.stack([one[e] / (mass + 1e-9) for e in chosen]))
    assert moved > 0
    factor = torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((routing.weights * factor).sum(), x)
    loop = torch.stack(
        [torch.stack([p[e] for e in largest(p.detach() + bias, 2)]) for p in probabilities_of(moe, x)]
    )
    (expected,) = torch.autograd.grad((loop / (loop.sum(1, keepdim=True) + 1e-9) * factor).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)

    moe.router.selection_bias.zero_()
    assert torch.equal(moe.router(x).experts, plain.router(x).experts)
    assert torch.equal(moe(x)[0], plain(x)[0])


def test_counts_shares_and_directions() -> None:
    experts = torch.tensor([[2, 0], [2, 3], [0, 2]])
    loads = count_experts(experts, E)
    assert loads.tolist() == [2, 0, 3, 1, 0]
    assert load_shares(loads).tolist() == pytest.approx([1 / 3, 0, 1 / 2, 1 / 6, 0])
    assert bias_direction(loads).tolist() == [-1, 1, -1, 1, 1]  # the mean is 1.2
    assert bias_direction(torch.tensor([[3, 3], [1, 4]])).tolist() == [[0, 0], [1, -1]]
    assert load_shares(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [[0.0] * 3] * 2
    large = torch.tensor([2**40, 2**40 + 1, 2**40 - 1])  # exact where floating point numbers are not
    assert bias_direction(large).tolist() == [0, -1, 1]


def test_the_bias_stays_fp32_and_is_no_parameter() -> None:
    router = Router(D, E, 2, biased=True)
    assert [name for name, _ in router.named_parameters()] == ["proj.weight"]
    router.selection_bias.fill_(0.3001)
    for move in (
        lambda: router.to(torch.bfloat16),
        lambda: router.to(torch.device("cpu"), torch.bfloat16),
        router.half,
    ):
        move()
        assert router.selection_bias.dtype == torch.float32
        assert torch.equal(router.selection_bias, torch.full((E,), 0.3001))
    assert router.proj.weight.dtype == torch.float16
    assert dict(router.named_buffers()).keys() == {"selection_bias"}
    assert Router(D, E, 2).selection_bias is None


def test_biases_of_a_new_model_are_zero() -> None:
    model = build_model(
        model_config(decoder={"moe": {"num_experts": 4, "top_k": 2, "bias_update_rate": 0.1}}), 0
    )
    biases = dict(model.named_buffers())
    assert biases.keys() == {
        f"decoder.layers.{number}.feed_forward.router.selection_bias"
        for number in range(len(model.decoder.layers))
    }
    assert not any(bias.any() for bias in biases.values())


@pytest.mark.parametrize("aux_loss", ["reference", "switch"])
def test_final_stateless_layers_count_but_in_the_reference_value(aux_loss: str) -> None:
    moe = {"num_experts": 4, "top_k": 2, "aux_loss": aux_loss, "z_loss_weight": 1.0}
    config = model_config(decoder={"moe": moe, "final_stateless_layers": ["moe"]})
    model = build_model(config, 0)
    seen = []
    for module in (*model.decoder.layers, *model.decoder.final_stateless_layers):
        module.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    _, output, _ = joint_pass(model, random_tokens([6]), [6])
    counted = seen if aux_loss == "switch" else seen[:-1]
    torch.testing.assert_close(output.aux_sum, sum(sums.balance for sums in counted) / len(counted))
    torch.testing.assert_close(output.z_sum, sum(sums.z for sums in seen) / len(seen))


def test_biases_even_out_loads() -> None:
    """A router that prefers two experts; nothing but the biases moves."""
    moe = layer(bias_update_rate=0.02)
    with torch.no_grad():
        moe.router.proj.weight[:2, 0] += 2.0
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(2))
    x[:, 0] = 1.0
    peaks = []
    for _ in range(60):
        loads = count_experts(moe.router(x).experts, E)
        peaks.append(float(load_shares(loads).max()) * E)
        moe.router.selection_bias.add_(bias_direction(loads), alpha=0.02)
    assert peaks[0] > 1.7
    assert peaks[-1] < 1.2
