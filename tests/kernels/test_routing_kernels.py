"""The kernels of routing and of sorting by expert, on a CPU, against their definitions."""

from __future__ import annotations

import pytest
import torch
from helpers.interpreter import interpreter  # noqa: F401

from rxt_dist.kernels import order_triton, triton_support
from rxt_dist.kernels.order_triton import count_keys, counting_sort
from rxt_dist.kernels.router_triton import route
from rxt_dist.model.balance import count_experts
from rxt_dist.model.moe import ExpertOrder, Router

EPS = 1e-9
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # the interpreter cuts off instead of rounding

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # Of numpy, about rows of NaN.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning"),
]


def by_definition(
    logits: torch.Tensor, experts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and mass of the given experts, and all probabilities, of fp64 logits."""
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    top = probabilities.gather(1, experts)
    mass = top.sum(dim=1)
    return top / (mass[:, None] + EPS), mass, probabilities


@pytest.mark.parametrize(
    ("tokens", "count", "columns", "top_k", "biased", "dtype"),
    [
        (40, 36, 40, 6, False, torch.float32),  # more than one program
        (33, 36, 36, 6, True, torch.bfloat16),
        (35, 36, 40, 6, False, torch.bfloat16),
        (2, 300, 304, 10, False, torch.bfloat16),  # a row fills a warp
        (2, 300, 300, 10, True, torch.float32),
        (3, 5, 11, 5, False, torch.float32),
        (1, 5, 8, 2, True, torch.float32),
        (2, 1, 1, 1, False, torch.float32),
        (0, 4, 8, 2, True, torch.float32),
    ],
)
def test_route(tokens: int, count: int, columns: int, top_k: int, biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    aligned = torch.randn(tokens, columns, generator=generator).mul(2).to(dtype)
    aligned[:, count:] += 9  # which nobody chooses
    logits = aligned[:, :count].clone()
    aligned.requires_grad_()
    bias = torch.randn(count, generator=generator) * 0.02 if biased else None
    weights, experts, mass = route(aligned, bias, count, top_k, EPS)
    assert (weights.dtype, experts.dtype, mass.dtype) == (torch.float32, torch.int64, torch.float32)

    exact = logits.double().requires_grad_()
    expected_weights, expected_mass, probabilities = by_definition(exact, experts)
    scores = probabilities.detach() if bias is None else probabilities.detach() + bias
    best = scores.sort(dim=1, descending=True).values[:, :top_k]
    torch.testing.assert_close(scores.gather(1, experts), best, rtol=1e-6, atol=1e-7)
    assert all(len(set(row)) == top_k for row in experts.tolist())
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass.double(), expected_mass, rtol=1e-5, atol=1e-6)

    slopes = [torch.randn(x.shape, generator=generator) for x in (weights, mass)]
    torch.autograd.backward([weights, mass], slopes)
    torch.autograd.backward([expected_weights, expected_mass], [slope.double() for slope in slopes])
    assert aligned.grad.dtype == dtype
    found = aligned.grad[:, :count].double()
    torch.testing.assert_close(found, exact.grad, rtol=TOLERANCE[dtype], atol=1e-6)
    assert not aligned.grad[:, count:].any()


def test_a_loss_of_the_weights_or_of_the_mass_alone() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for chosen in (0, 1):
        found = route(logits, None, 6, 3, EPS)
        expected = by_definition(exact := logits.detach().double().requires_grad_(), found[1])[chosen]
        (gradient,) = torch.autograd.grad(found[2 * chosen].square().sum(), logits)
        (wanted,) = torch.autograd.grad(expected.square().sum(), exact)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


def test_of_equal_scores_the_lowest_expert_comes_first() -> None:
    logits = torch.tensor([[0.0] * 7, [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 2.0], [0.0] * 5 + [200.0, 0.0]])
    experts = route(logits, None, 7, 4, EPS)[1]
    assert experts.tolist() == [[0, 1, 2, 3], [1, 3, 5, 6], [5, 0, 1, 2]]
    level = torch.tensor([-0.5, -0.5, -1.0, -0.2, -1.0, -0.2, -3.0])  # scores below 0
    assert route(torch.zeros(1, 7), level, 7, 6, EPS)[1].tolist() == [[3, 5, 0, 1, 2, 4]]


@pytest.mark.parametrize(
    ("biased", "dtype"),
    [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16), (False, torch.float16)],
)
def test_experts_of_any_logits_are_distinct_and_in_range(biased: bool, dtype: torch.dtype) -> None:
    wild = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    wild[0], wild[1, 3], wild[2], wild[3, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    all_bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    wild[4], wild[5, 7] = torch.tensor([-1, -1], dtype=all_bits).view(dtype)  # NaN too
    bias = torch.zeros(8)
    bias[2] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    weights, experts, _ = route(wild, bias if biased else None, 8, 8, EPS)
    assert experts.sort(dim=1).values.tolist() == [list(range(8))] * 7
    assert torch.isfinite(weights[6]).all()


@pytest.mark.parametrize("biased", [False, True])
def test_the_router_computes_the_same_with_it(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(8, 6, 2, biased=biased)
    generator = torch.Generator().manual_seed(2)
    if router.selection_bias is not None:
        router.selection_bias.copy_(torch.randn(6, generator=generator) * 0.1)
    x = torch.randn(11, 8, generator=generator).requires_grad_()
    slopes = [torch.randn(shape, generator=generator) for shape in ((11, 2), (11,), (11, 6), (11, 6))]
    found = []
    for inside in (True, False):
        monkeypatch.setattr(triton_support, "interpreted", inside)
        routing = router(x)
        outputs = [routing.weights, routing.chosen_mass, routing.logits, routing.probabilities]
        gradients = torch.autograd.grad(outputs, [x, router.proj.weight], slopes)
        found.append([routing.experts, *outputs, *gradients])
    assert torch.equal(found[0][0], found[1][0])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "count"), [(0, 3), (1, 1), (127, 3), (128, 36), (1000, 36), (700, 300)])
def test_counting_sort(rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_triton, "_BLOCKS", 4)  # summed in several turns
    generator = torch.Generator().manual_seed(rows)
    keys = torch.randint(0, count, (rows,), generator=generator)
    if count > 30:
        keys[keys % 7 == 3] = 20  # one long run, and keys without rows
    order, inverse, ordered, ends, total = counting_sort(keys, count)
    assert total.tolist() == [rows]
    expected, places = torch.sort(keys, stable=True)
    assert torch.equal(ordered, expected)
    assert torch.equal(order, places)
    assert torch.equal(inverse[order], torch.arange(rows))
    assert torch.equal(ends, torch.bincount(keys, minlength=count).cumsum(0).to(torch.int32))
    assert torch.equal(count_keys(keys, count), ends)
    assert torch.equal(count_experts(keys, count), torch.bincount(keys, minlength=count))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("rows", "first", "count"), [(0, 2, 3), (300, 3, 4), (700, 0, 5), (129, 8, 2), (50, 90, 3)]
)
def test_counting_sort_of_some_keys(
    rows: int, first: int, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In columns of a wider table, others behind."""
    monkeypatch.setattr(order_triton, "_BLOCKS", 4)
    table = torch.randint(0, 10, (rows, 7), generator=torch.Generator().manual_seed(rows), dtype=dtype)
    keys = table[:, 4:]
    order, inverse, ordered, ends, total = counting_sort(keys, count, first, others=True)
    numbers = keys.flatten().long() - first
    numbers[(numbers < 0) | (numbers >= count)] = count
    expected, places = torch.sort(numbers, stable=True)
    assert torch.equal(ordered, expected)
    assert torch.equal(order, places)
    assert torch.equal(ends, torch.bincount(numbers, minlength=count + 1).cumsum(0)[:count].to(torch.int32))
    kept = numbers < count
    assert total.tolist() == [int(kept.sum())]
    assert torch.equal(inverse[kept].sort().values, torch.arange(int(kept.sum())))
    assert torch.equal(order[inverse[kept]], kept.nonzero().flatten())
    assert (inverse[~kept] == -1).all()


def test_expert_order_is_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = torch.randint(0, 9, (50, 3), generator=torch.Generator().manual_seed(1))
    found = []
    for interpreted in (True, False):
        monkeypatch.setattr(triton_support, "interpreted", interpreted)
        some = [ExpertOrder.of_some(experts, range(3, 7), room) for room in (None, 150, 20, 0)]
        found.append([ExpertOrder.of(experts, 9), *some])
    for ours, plain in zip(*found, strict=True):
        for name in ("order", "inverse", "expert_of_row", "offsets", "count"):
            left, right = getattr(ours, name), getattr(plain, name)
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("room", [0, 1, 17, 72, 73, 74, 150])
def test_rows_that_find_no_room_are_left_out(
    room: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "interpreted", kernels)
    experts = torch.randint(0, 9, (50, 3), generator=torch.Generator().manual_seed(1))
    whole = ExpertOrder.of_some(experts, range(3, 7))
    count = int(whole.offsets[-1])
    assert count == 73
    found = ExpertOrder.of_some(experts, range(3, 7), room)
    kept = min(room, count)
    assert len(found.order) == len(found.expert_of_row) == room
    assert torch.equal(found.order[:kept], whole.order[:kept])
    assert torch.equal(found.expert_of_row[:kept], whole.expert_of_row[:kept])
    assert torch.equal(found.inverse, torch.where(whole.inverse < room, whole.inverse, -1))
    assert torch.equal(found.offsets, whole.offsets.clamp_max(room))
    assert found.count.tolist() == whole.count.tolist() == [count]
