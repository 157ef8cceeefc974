"""Activations of experts' rows and their way back into tokens: kernels and plain operators, against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.interpreter import interpreter  # noqa: F401

from rxt_dist.kernels import triton_support
from rxt_dist.kernels.activation import Activation, activate, activate_rows
from rxt_dist.kernels.combine import combine_rows
from rxt_dist.kernels.permute import add_permuted, repeat_permuted
from rxt_dist.kernels.segments_triton import new_segments, sum_segments
from rxt_dist.model.moe import ExpertOrder, Experts

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
ROWS = {
    "many experts in a block": [3, 0, 5, 1, 0, 0, 7],
    "experts of many blocks": [130, 0, 1, 64, 0, 69],
    "ends of blocks": [64, 64, 0, 1],
    "one row": [0, 1, 0],
    "nothing for the first and last": [0, 0, 90, 0],
    "no rows": [0, 0, 0],
    "dozens of experts": [1, 0, 3] * 14,
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * torch.distributions.Normal(x.new_zeros(()), 1).cdf(x),
    "relu": lambda x: x * (x > 0),
}


@pytest.fixture(params=["kernel", "plain"])
def backend(request: pytest.FixtureRequest) -> str:
    """In Triton's interpreter, or by PyTorch's operators."""
    if request.param == "kernel":
        request.getfixturevalue("interpreter")
    name: str = request.param
    return name


def grouped(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """offsets, expert_of_row"""
    numbers = torch.tensor(counts)
    return numbers.cumsum(0).to(torch.int32), torch.repeat_interleave(torch.arange(len(counts)), numbers)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def exactly(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """fp64 copies with gradients of their own."""
    return [t.detach().double().requires_grad_() for t in tensors if t is not None]


def assert_near(found: torch.Tensor | None, exact: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Kernels round a bf16 result once; operators round every intermediate result."""
    assert found is not None
    assert exact is not None
    assert found.dtype == dtype
    assert found.shape == exact.shape
    limit = TOLERANCE[dtype] if triton_support.interpreted or dtype == torch.float32 else 2**-5
    scale = float(exact.detach().abs().amax()) if exact.numel() else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=limit * scale)


def plain_activation(hidden: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    if not gated:
        return ACTIVATIONS[activation](hidden)
    half = hidden.shape[-1] // 2
    return hidden[..., :half] * ACTIVATIONS[activation](hidden[..., half:])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "width", "activation", "gated"),
    [
        ("many experts in a block", 8, "silu", True),
        ("experts of many blocks", 130, "silu", True),
        ("experts of many blocks", 5, "gelu", True),
        ("ends of blocks", 128, "relu", True),
        ("ends of blocks", 70, "silu", False),
        ("one row", 3, "gelu", False),
        ("nothing for the first and last", 16, "relu", False),
        ("no rows", 8, "silu", True),
        ("dozens of experts", 6, "silu", True),
    ],
)
def test_activation_of_rows(
    backend: str, rows: str, width: int, activation: Activation, gated: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    offsets, expert_of_row = grouped(ROWS[rows])
    inner, count = 2 * width if gated else width, sum(ROWS[rows])
    hidden = random(count, inner, dtype=dtype)
    bias = random(len(ROWS[rows]), inner, dtype=dtype)
    out = activate_rows(hidden, bias, offsets, expert_of_row, activation, gated)
    exact_hidden, exact_bias = exactly(hidden, bias)
    exact = plain_activation(exact_hidden + exact_bias[expert_of_row], activation, gated)
    assert_near(out, exact, dtype)
    factor = torch.randn(count, width).to(dtype)
    (out * factor).sum().backward()
    (exact * factor).sum().backward()
    assert_near(hidden.grad, exact_hidden.grad, dtype)
    assert_near(bias.grad, exact_bias.grad, dtype)
    assert bias.grad is not None
    for expert, number in enumerate(ROWS[rows]):
        assert bool(bias.grad[expert].any()) == (number > 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "gated"), [((67, 24), True), ((2, 3, 10), True), ((5, 7), False), ((0, 4), True)]
)
def test_activation_without_bias(
    backend: str, shape: tuple[int, ...], gated: bool, activation: Activation
) -> None:
    torch.manual_seed(0)
    hidden = random(*shape, dtype=torch.float32)
    (exact_hidden,) = exactly(hidden)
    out = activate(hidden, activation, gated)
    exact = plain_activation(exact_hidden, activation, gated)
    assert_near(out, exact, torch.float32)
    factor = torch.randn(out.shape)
    (out * factor).sum().backward()
    (exact * factor).sum().backward()
    assert_near(hidden.grad, exact_hidden.grad, torch.float32)


def test_activation_of_a_transposed_view(backend: str) -> None:
    torch.manual_seed(0)
    base = random(4, 3, 12, dtype=torch.float32)
    activate(base.transpose(0, 1), "silu", True).sum().backward()
    (exact,) = exactly(base)
    plain_activation(exact.transpose(0, 1), "silu", True).sum().backward()
    assert_near(base.grad, exact.grad, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_undefined_values(backend: str, activation: Activation) -> None:
    """No overflow on the way; what is not a number stays so, alone."""
    hidden = torch.tensor([[-500.0, 500.0, 0.0, float("nan")]], requires_grad=True)
    out = activate(hidden, activation, False)
    out.sum().backward()
    assert hidden.grad is not None
    assert out[0, :3].tolist() == [0.0, 500.0, 0.0]
    assert hidden.grad[0, :2].tolist() == [0.0, 1.0]
    assert out[0, 3].isnan()
    assert torch.isfinite(hidden.grad[0, :3]).all()


def shuffled(counts: list[int], slots: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Different slots, one for each row, and the row of each slot, -1 without one."""
    count = sum(counts)
    order = torch.randperm(count if slots is None else slots)[:count]
    inverse = torch.full((count if slots is None else slots,), -1)
    inverse[order] = torch.arange(count)
    return order, inverse


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "copies", "spare"),
    [
        ("many experts in a block", 8, 4, 0),
        ("many experts in a block", 8, 4, 3),
        ("experts of many blocks", 130, 6, 0),
        ("experts of many blocks", 130, 6, 170),
        ("experts of many blocks", 5, 3, 0),
        ("ends of blocks", 128, 1, 0),
        ("ends of blocks", 128, 1, 40),
        ("one row", 16, 1, 0),
        ("one row", 16, 3, 2),
        ("nothing for the first and last", 70, 10, 0),
        ("no rows", 8, 2, 0),
        ("no rows", 8, 2, 5),
        ("dozens of experts", 9, 4, 3),
        ("ends of blocks", 1100, 3, 0),
    ],
)
def test_weighted_sums_of_rows(
    backend: str, rows: str, width: int, copies: int, spare: int, biased: bool, dtype: torch.dtype
) -> None:
    """Of tokens of which each has all its rows, or (``spare`` more tokens) some or none."""
    torch.manual_seed(0)
    counts = ROWS[rows]
    tokens = sum(counts) // copies + spare
    (offsets, expert_of_row), (order, inverse) = grouped(counts), shuffled(counts, tokens * copies)
    x = random(sum(counts), width, dtype=dtype)
    bias = random(len(counts), width, dtype=dtype) if biased else None
    weights = random(tokens, copies, dtype=torch.float32)
    out = combine_rows(x, bias, weights, order, inverse, offsets, expert_of_row)
    exact_x, exact_weights, *exact_bias = exactly(x, weights, bias)
    outputs = exact_x + exact_bias[0][expert_of_row] if biased else exact_x
    exact = torch.zeros(tokens, width, dtype=torch.float64)
    exact = exact.index_add(0, order // copies, outputs * exact_weights.flatten()[order, None])
    assert_near(out, exact, dtype)
    factor = torch.randn(tokens, width).to(dtype)
    (out * factor).sum().backward()
    (exact * factor).sum().backward()
    assert_near(x.grad, exact_x.grad, dtype)
    if dtype == torch.float32 or backend == "kernel":  # operators have weights in bf16
        assert_near(weights.grad, exact_weights.grad, torch.float32)
    assert weights.grad is not None
    assert not weights.grad.flatten()[inverse < 0].any()
    if bias is not None:
        assert_near(bias.grad, exact_bias[0].grad, dtype)
        assert bias.grad is not None
        assert [bool(row.any()) for row in bias.grad] == [number > 0 for number in counts]


@pytest.mark.parametrize("frozen", ["rows", "bias", "weights"])
def test_what_is_frozen_has_no_gradient(backend: str, frozen: str) -> None:
    torch.manual_seed(0)
    counts = ROWS["many experts in a block"]
    (offsets, expert_of_row), (order, inverse) = grouped(counts), shuffled(counts)
    inputs = {
        "rows": random(16, 8, dtype=torch.float32),
        "bias": random(7, 8, dtype=torch.float32),
        "weights": random(8, 2, dtype=torch.float32),
    }
    wanted = []
    for names in (list(inputs), [name for name in inputs if name != frozen]):
        for name, tensor in inputs.items():
            tensor.requires_grad_(name in names)
        out = combine_rows(*inputs.values(), order, inverse, offsets, expert_of_row)
        wanted.append(torch.autograd.grad(out.square().sum(), [inputs[name] for name in names]))
    everything = dict(zip(inputs, wanted[0], strict=True))
    for name, gradient in zip([name for name in inputs if name != frozen], wanted[1], strict=True):
        assert torch.equal(gradient, everything[name])


@pytest.mark.usefixtures("interpreter")
def test_sums_of_many_blocks() -> None:
    """Of more segments of an expert than are added at once; what no expert has is not read."""
    block, counts = 8, [5, 0, 8 * 150 + 3, 0, 16, 1]
    offsets, expert_of_row = grouped(counts)
    like = torch.empty(len(counts), 3)
    segments = new_segments(sum(counts), block, like).fill_(float("nan"))
    assert segments.shape == (154 + len(counts), 3)
    expected = torch.zeros(len(counts), 3)
    for row, expert in enumerate(expert_of_row.tolist()):
        segments[row // block + expert] = torch.randn(3)
    for expert in set(expert_of_row.tolist()):
        blocks = {row // block for row in range(sum(counts)) if expert_of_row[row] == expert}
        expected[expert] = segments[[number + expert for number in sorted(blocks)]].sum(0)
    torch.testing.assert_close(sum_segments(segments, offsets, block, like), expected)


@pytest.mark.usefixtures("interpreter")
def test_nothing_is_written_beyond_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of rows and columns that fill no block stand before memory that must stay as it is."""
    memories: list[tuple[torch.Tensor, int]] = []

    def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape)
        memories.append((torch.full((size + 100_000,), 77.0, dtype=dtype), size))
        return memories[-1][0][:size].view(shape)

    plain = torch.Tensor.new_empty

    def new_empty(x: torch.Tensor, *shape: int, dtype: torch.dtype | None = None, **kw: Any) -> torch.Tensor:
        return plain(x, *shape, **kw) if kw else guarded(shape, dtype or x.dtype)  # the interpreter's own

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: guarded(tuple(x.shape), x.dtype))
    monkeypatch.setattr(torch, "zeros_like", lambda x: guarded(tuple(x.shape), x.dtype).zero_())
    counts = ROWS["experts of many blocks"]
    (offsets, expert_of_row), (order, inverse) = grouped(counts), shuffled(counts)
    hidden = random(sum(counts), 140, dtype=torch.float32)
    bias, output_bias = (random(len(counts), width, dtype=torch.float32) for width in (140, 70))
    weights = random(sum(counts) // 3, 3, dtype=torch.float32)
    rows = activate_rows(hidden, bias, offsets, expert_of_row, "silu", True)
    combine_rows(rows, output_bias, weights, order, inverse, offsets, expert_of_row).sum().backward()
    assert len(memories) == 9  # two results, gradients of five inputs, segments of two biases
    for memory, size in memories:
        assert (memory[size:] == 77.0).all()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 80])
def test_room_behind_the_rows_changes_nothing(
    spare: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in it: here what is no number."""
    torch.manual_seed(0)
    experts = Experts(3, 16, 24, gated=True, activation="silu", biased=biased)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, chosen = random(60, 16, dtype=torch.float32), torch.rand(60, 6).topk(3).indices
    weights = random(60, 3, dtype=torch.float32)
    inputs, factor = [x, weights, *experts.parameters()], torch.randn(60, 16)

    def run(order: ExpertOrder) -> tuple[torch.Tensor, ...]:
        out = experts(x, order, weights)
        return out, *torch.autograd.grad((out * factor).sum(), inputs)

    whole = ExpertOrder.of_some(chosen, range(2, 5))
    count = int(whole.offsets[-1])
    assert count + 80 < chosen.numel()
    exact = run(whole.first(count))
    plain, multiply = torch.Tensor.new_empty, F.grouped_mm

    def new_empty(tensor: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        made = plain(tensor, *shape, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    def grouped_mm(left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
        made = multiply(left, right, **options)
        if right.ndim == 3:
            made[count:] = math.nan
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    order = ExpertOrder.of_some(chosen, range(2, 5), count + spare)
    assert len(order.order) == count + spare
    for found, wanted in zip(run(order), exact, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "copies", "width", "missing"),
    [
        (23, 6, 130, 0),
        (23, 6, 130, 50),
        (5, 1, 8, 0),
        (5, 1, 8, 2),
        (17, 10, 5, 0),
        (17, 10, 5, 169),
        (3, 2, 8, 6),
        (0, 2, 8, 0),
    ],
)
def test_gradient_of_repeated_rows(
    backend: str, tokens: int, copies: int, width: int, missing: int, dtype: torch.dtype
) -> None:
    """All copies of rows, or only some (``missing``: how many there are not)."""
    torch.manual_seed(0)
    slots = tokens * copies
    order, inverse = shuffled([slots - missing], slots)
    x, factor = random(tokens, width, dtype=dtype), torch.randn(slots - missing, width).to(dtype)
    (exact_x,) = exactly(x)
    rows = repeat_permuted(x, order, inverse, copies)
    assert torch.equal(rows, x.repeat_interleave(copies, 0)[order])
    (rows * factor).sum().backward()
    (exact_x.repeat_interleave(copies, 0)[order] * factor).sum().backward()
    assert_near(x.grad, exact_x.grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "copies", "width", "missing"),
    [(23, 6, 130, 50), (23, 2, 6, 0), (40, 3, 70, 90), (5, 1, 8, 2), (3, 2, 8, 6), (0, 2, 8, 0)],
)
def test_sums_of_copies(
    backend: str, tokens: int, copies: int, width: int, missing: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    slots = tokens * copies
    order, inverse = shuffled([slots - missing], slots)
    rows, factor = random(slots - missing, width, dtype=dtype), torch.randn(tokens, width).to(dtype)
    (exact_rows,) = exactly(rows)
    out = add_permuted(rows, order, inverse, copies)
    exact = torch.zeros(tokens, width, dtype=torch.float64).index_add(0, order // copies, exact_rows)
    assert_near(out, exact, dtype)
    (out * factor).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, factor[order // copies])


def test_gradients_by_finite_differences() -> None:
    counts = [3, 0, 5]
    (offsets, expert_of_row), (order, inverse) = grouped(counts), shuffled(counts)
    hidden, bias = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (8, 3))
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def layer(hidden: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = activate_rows(hidden, bias, offsets, expert_of_row, "silu", True)
        return combine_rows(rows, F.silu(bias[:, :3]), weights, order, inverse, offsets, expert_of_row)

    assert torch.autograd.gradcheck(layer, (hidden, bias, weights))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "spare"), [("experts of many blocks", 7), ("one row", 0), ("no rows", 5)])
def test_weighted_sums_are_added_to_others(backend: str, rows: str, spare: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = ROWS[rows]
    tokens = sum(counts) + spare
    (offsets, expert_of_row), (order, inverse) = grouped(counts), shuffled(counts, tokens)
    x, base = random(sum(counts), 72, dtype=dtype), random(tokens, 72, dtype=dtype)
    weights = torch.rand(tokens, 1)
    out = combine_rows(x, None, weights, order, inverse, offsets, expert_of_row, base)
    exact_x, exact_base = exactly(x, base)
    exact = exact_base.index_add(0, order, exact_x * weights.double()[order])
    assert_near(out, exact, dtype)
    factor = torch.randn(tokens, 72).to(dtype)
    (out * factor).sum().backward()
    (exact * factor).sum().backward()
    assert_near(x.grad, exact_x.grad, dtype)
    assert_near(base.grad, exact_base.grad, dtype)
