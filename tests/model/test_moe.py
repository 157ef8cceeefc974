"""The mixture of experts against an explicit loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_samples import perturb
from torch.utils._python_dispatch import TorchDispatchMode

from rxt_dist.config import MoEConfig
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import ExpertOrder, Experts, MoE, Router, SharedExperts

D, HIDDEN, E = 16, 12, 5


def make(gated: bool = True, **fields: Any) -> MoE:
    config = MoEConfig(**{"num_experts": E, "top_k": 2, **fields})
    moe = MoE(config, D, HIDDEN, gated=gated, activation="silu")
    initialise(moe, seed=1)
    perturb(moe)
    return moe


def balanced(moe: MoE) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Output and balance value of a layer."""

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = moe(x)
        return out, sums.balance

    return run


def expert(x: torch.Tensor, w_in: Any, b_in: Any, w_out: Any, b_out: Any, gated: bool) -> torch.Tensor:
    hidden = w_in @ x + (0 if b_in is None else b_in)
    if gated:
        hidden = hidden[: len(hidden) // 2] * F.silu(hidden[len(hidden) // 2 :])
    else:
        hidden = F.silu(hidden)
    return w_out @ hidden + (0 if b_out is None else b_out)


def pick(stack: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if stack is None else stack[index]


def stacked(module: Any, index: int, x: torch.Tensor) -> torch.Tensor:
    parts = [pick(getattr(module, name), index) for name in ("w_in", "b_in", "w_out", "b_out")]
    return expert(x, *parts, module.gated)


def by_loop(moe: MoE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = moe.config
    outputs, balance = [], torch.zeros(())
    for row in x:
        probabilities = torch.softmax(moe.router.proj.weight @ row, dim=0)
        top, chosen = probabilities.topk(config.top_k)
        weights = top / (top.sum() + 1e-9)
        routed = sum(w * stacked(moe.experts, int(e), row) for w, e in zip(weights, chosen, strict=True))
        if moe.output_bias is not None:
            routed = routed + moe.output_bias
        balance = balance + config.num_experts / config.top_k * top.sum()
        shared = None
        if isinstance(moe.shared, FeedForward):
            shared = moe.shared(row[None])[0]
        elif isinstance(moe.shared, SharedExperts):
            gate = torch.softmax(moe.shared.gate.weight @ row, dim=0)
            shared = sum(gate[s] * stacked(moe.shared, s, row) for s in range(config.num_shared_experts))
            if moe.shared.output_bias is not None:
                shared = shared + moe.shared.output_bias
            balance = balance + (gate - 1 / config.num_shared_experts).abs().mean()
        if shared is not None:
            total = config.top_k + config.num_shared_experts
            scale = (config.top_k / total, config.num_shared_experts / total)
            routed_scale, shared_scale = scale if config.weighted_shared_experts else (1.0, 1.0)
            routed = routed * routed_scale + shared * shared_scale
        outputs.append(routed)
    return torch.stack(outputs), balance


CASES: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"bias": "global"},
    "off": {"bias": "off"},
    "top-1": {"top_k": 1},
    "all": {"top_k": E},
    "ungated": {"gated": False},
    "shared-1": {"num_shared_experts": 1, "shared_expert_dim": 20},
    "shared-1-weighted": {"num_shared_experts": 1, "weighted_shared_experts": True},
    "shared-3": {"num_shared_experts": 3},
    "shared-2-global": {"num_shared_experts": 2, "shared_bias": "global", "bias": "global"},
    "shared-2-off-weighted": {"num_shared_experts": 2, "shared_bias": "off", "weighted_shared_experts": True},
}


@pytest.mark.parametrize("name", CASES)
def test_output_balance_and_gradients(name: str) -> None:
    moe = make(**CASES[name])
    torch.manual_seed(0)
    x = torch.randn(9, D, requires_grad=True)
    factor = torch.randn(9, D)
    results = []
    for run in (balanced(moe), lambda x: by_loop(moe, x)):
        moe.zero_grad(set_to_none=True)
        x.grad = None
        out, balance = run(x)
        ((out * factor).sum() + 0.3 * balance).backward()
        grads = {key: p.grad for key, p in moe.named_parameters()}
        results.append((out, balance, x.grad, grads))
    (out, balance, grad_x, grads), (expected, expected_balance, expected_grad_x, expected_grads) = results
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(balance, expected_balance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, expected_grad_x, rtol=1e-4, atol=1e-5)
    for key, gradient in grads.items():
        assert gradient is not None, key
        torch.testing.assert_close(gradient, expected_grads[key], rtol=1e-4, atol=1e-5, msg=key)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    moe = make()
    with torch.no_grad():  # positive inputs never choose experts 3 and 4
        moe.router.proj.weight[:3] = 1.0
        moe.router.proj.weight[3:] = -1.0
    x = torch.rand(6, D)
    out, _ = moe(x)
    torch.testing.assert_close(out, by_loop(moe, x)[0], rtol=1e-5, atol=1e-5)
    out.pow(2).sum().backward()
    for key, parameter in moe.experts.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad[3:], torch.zeros_like(parameter.grad[3:])), key
        assert parameter.grad[:3].abs().sum() > 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [0, 1])
def test_few_tokens(name: str, rows: int) -> None:
    moe = make(**CASES[name])
    out, balance = balanced(moe)(torch.randn(rows, D))
    assert out.shape == (rows, D)
    (out.sum() + balance).backward()
    for key, parameter in moe.named_parameters():
        assert parameter.grad is not None, key
        if rows == 0:
            assert not parameter.grad.any(), key


def test_reference_balance_is_between_one_and_experts_over_k() -> None:
    moe = make()
    with torch.no_grad():
        moe.router.proj.weight.zero_()
    assert balanced(moe)(torch.randn(7, D))[1].item() == pytest.approx(7.0, rel=1e-5)
    with torch.no_grad():
        moe.router.proj.weight[:2, 0] = 1000.0
    x = torch.ones(7, D)
    assert balanced(moe)(x)[1].item() == pytest.approx(7.0 * E / 2, rel=1e-5)


def test_without_auxiliary_loss_there_is_no_balance_value() -> None:
    assert make(aux_loss="none")(torch.randn(4, D))[1] == (None, None)


def test_expert_order() -> None:
    order = ExpertOrder.of(torch.tensor([[2, 0], [2, 3], [0, 2]]), 5)
    assert order.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert order.expert_of_row.tolist() == [0, 0, 2, 2, 2, 3]
    assert order.offsets.tolist() == [2, 2, 5, 6, 6]
    assert order.offsets.dtype == torch.int32
    assert order.order[order.inverse].tolist() == list(range(6))


def test_order_of_some_experts() -> None:
    chosen = torch.tensor([[2, 0], [2, 3], [0, 1], [3, 4]])
    order = ExpertOrder.of_some(chosen, range(2, 4)).first(4)
    assert order.order.tolist() == [0, 2, 3, 6]
    assert order.inverse.tolist() == [0, -1, 1, 2, -1, -1, 3, -1]
    assert order.expert_of_row.tolist() == [0, 0, 1, 1]
    assert order.offsets.tolist() == [2, 4]
    assert order.offsets.dtype == torch.int32
    nothing = ExpertOrder.of_some(chosen[:1], range(3, 5)).first(0)
    assert (nothing.order.tolist(), nothing.inverse.tolist(), nothing.offsets.tolist()) == (
        [],
        [-1, -1],
        [0, 0],
    )


@pytest.mark.parametrize("bias", ["local", "off"])
def test_parts_of_the_experts_add_up_to_all(bias: str) -> None:
    """Outputs and gradients; what a part leaves out has exactly no gradient there."""
    moe = make(num_experts=7, bias=bias).double()
    whole, chosen = moe.experts, torch.rand(9, 7).topk(2).indices
    chosen[:, 1] = 5  # of the last part, which all tokens need
    x, weights = (torch.randn(9, n, dtype=torch.float64, requires_grad=True) for n in (D, 2))
    factor = torch.randn(9, D, dtype=torch.float64)
    expected = whole(x, ExpertOrder.of(chosen, 7), weights)
    gradients = torch.autograd.grad(expected, [x, weights, *whole.parameters()], factor)
    total, found = torch.zeros_like(expected), [torch.zeros_like(one) for one in gradients]
    for held in (range(3), range(3, 4), range(4, 7)):
        part = Experts(len(held), D, HIDDEN, gated=True, activation="silu", biased=bias == "local").double()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(whole.get_parameter(name)[held.start : held.stop])
        here = (chosen >= held.start) & (chosen < held.stop)
        out = part(x, ExpertOrder.of_some(chosen, held).first(int(here.sum())), weights)
        ours = torch.autograd.grad(out, [x, weights, *part.parameters()], factor)
        assert not ours[1][~here].any()
        assert not ours[0][~here.any(1)].any()
        total += out
        found[0] += ours[0]
        found[1] += ours[1]
        for whole_gradient, gradient in zip(found[2:], ours[2:], strict=True):
            whole_gradient[held.start : held.stop] += gradient
    torch.testing.assert_close(total, expected)
    for left, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(left, right)


def test_bf16_routes_by_fp32_probabilities() -> None:
    moe = make().to(torch.bfloat16)
    routing = moe.router(torch.randn(6, D, dtype=torch.bfloat16))
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(6))
    out, balance = balanced(moe)(torch.randn(6, D, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert balance.dtype == torch.float32


class _Products(TorchDispatchMode):
    """Sizes of the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.sizes += [*args[0].shape, args[1].shape[1]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("experts", [1, 8, 36])
def test_products_of_the_router_have_aligned_rows(experts: int) -> None:
    router = Router(D, experts, 1)
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with _Products() as products:
        logits = router(x).logits
        logits.sum().backward()
    assert len(products.sizes) == 9  # of a forward and two backward products
    assert all(size % 8 == 0 for size in products.sizes)
    assert router.proj.weight.shape == (experts, D)
    torch.testing.assert_close(logits, x @ router.proj.weight.T)
    torch.testing.assert_close(x.grad, router.proj.weight.sum(0).expand(24, -1))
    torch.testing.assert_close(router.proj.weight.grad, x.sum(0).expand(experts, -1))
