"""Chunked cross-entropy against PyTorch's, its rows scored by operators and by the Triton kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.interpreter import interpreter

from rxt_dist.kernels import cross_entropy
from rxt_dist.kernels.cross_entropy import linear_cross_entropy, parts

M, D, V = 13, 16, 37
__all__ = ["interpreter"]


@pytest.fixture(params=["operators", "triton"], autouse=True)
def scorer(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return str(request.param)


def tensors(rows: int, dtype: torch.dtype, biased: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    inputs = [torch.randn(rows, D), torch.randn(V, D) * 0.3] + ([torch.randn(V)] if biased else [])
    return [x.to(dtype).requires_grad_() for x in inputs], torch.randint(0, V, (rows,))


def run(inputs: list[torch.Tensor], targets: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    bias = inputs[2] if len(inputs) > 2 else None
    return linear_cross_entropy(inputs[0], inputs[1], bias, targets, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients(chunk: int, biased: bool) -> None:
    inputs, targets = tensors(M, torch.float32, biased)
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    loss, correct = run(inputs, targets, chunk)
    logits = F.linear(*plain)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert correct.item() == (logits.argmax(1) == targets).sum().item()
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    for ours, theirs in zip(inputs, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_correct_rows_are_counted() -> None:
    inputs, _ = tensors(M, torch.float32, True)
    targets = F.linear(*inputs).argmax(1)
    targets[3] = (targets[3] + 1) % V
    loss, correct = run(inputs, targets, 5)
    assert correct.dtype == torch.int64
    assert correct.item() == M - 1
    assert not correct.requires_grad
    assert loss.dtype == torch.float32


def test_no_rows_give_zero_and_zero_gradients() -> None:
    inputs, targets = tensors(0, torch.float32, True)
    loss, correct = run(inputs, targets, 8)
    assert loss.item() == 0.0
    assert correct.item() == 0
    loss.backward()
    for x in inputs:
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_bf16_is_as_good_as_its_logits() -> None:
    inputs, targets = tensors(M, torch.bfloat16, True)
    loss, _ = run(inputs, targets, 4)
    logits = F.linear(*(x.detach() for x in inputs)).float()
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits, targets, reduction="sum"))
    loss.backward()
    exact = [x.detach().float().requires_grad_() for x in inputs]
    F.cross_entropy(F.linear(*exact), targets, reduction="sum").backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        error = (ours.grad.float() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 0.02


def test_gradients_only_where_asked_for() -> None:
    inputs, targets = tensors(M, torch.float32, True)
    inputs[1].requires_grad_(False)
    loss, _ = run(inputs, targets, 4)
    loss.backward()
    assert inputs[1].grad is None
    assert inputs[0].grad is not None


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((2, 1), 300.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 1]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(600.0)
    assert torch.isfinite(weight.grad).all()


def test_nothing_but_the_loss_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = tensors(M, torch.float32, True)
    trained = run(inputs, targets, 4)

    def refuse(*_: object) -> None:
        raise AssertionError("a gradient of logits was multiplied")

    monkeypatch.setattr(cross_entropy.ProjectionGradients, "add", refuse)
    with torch.no_grad():
        evaluated = run(inputs, targets, 4)
    assert not evaluated[0].requires_grad
    for ours, theirs in zip(evaluated, trained, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(AssertionError, match="multiplied"):
        run(inputs, targets, 4)


def test_the_backward_pass_can_be_repeated() -> None:
    inputs, targets = tensors(M, torch.float32, True)
    loss, _ = run(inputs, targets, 5)
    first, second = (
        torch.autograd.grad(loss, inputs, loss.new_tensor(x), retain_graph=True) for x in (1.0, 3.0)
    )
    for once, thrice in zip(first, second, strict=True):
        torch.testing.assert_close(3.0 * once, thrice)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "hidden and bias", "weight and bias"])
def test_any_of_the_gradients(wanted: str) -> None:
    inputs, targets = tensors(M, torch.float32, True)
    exact = [x.detach().clone().requires_grad_() for x in inputs]
    for x, name in zip(inputs, ("hidden", "weight", "bias"), strict=True):
        x.requires_grad_(name in wanted)
    run(inputs, targets, 4)[0].backward()
    F.cross_entropy(F.linear(*exact), targets, reduction="sum").backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        assert (ours.grad is not None) == ours.requires_grad
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def scored(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Losses, hits and gradient of the logits of every row."""
    losses, hits = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int32)
    gradient = cross_entropy._score_rows(logits.clone(), targets, losses, hits, wanted=True)
    assert gradient is not None
    return losses, hits, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 4096, 9001])  # the kernel reads 4,096 at a time
def test_rows_of_logits(vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    logits = (5.0 * torch.randn(4, vocabulary)).to(dtype)
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2, vocabulary // 3])
    logits[0, 0] = logits[0].max() + 1
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    losses, hits, gradient = scored(logits, targets)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    assert torch.equal(hits, (logits.argmax(1) == targets).int())
    assert hits[0] == 1
    assert gradient.dtype == dtype
    # To the nearest bf16; Triton's interpreter cuts the last bits off.
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=rounding, atol=1e-9)


def test_of_equal_logits_the_first_one_counts() -> None:
    logits = torch.zeros(4, 9001)
    logits[:, [7, 8, 5000]] = 3.0
    hits = scored(logits, torch.tensor([7, 8, 5000, 6]))[1]
    assert hits.tolist() == [1, 0, 0, 0]


def test_what_is_not_finite() -> None:
    logits = torch.randn(3, 5000)
    logits[0, :4500] = -torch.inf
    logits[1, 3] = torch.nan
    targets = torch.tensor([4700, 2, 10])
    losses, _, gradient = scored(logits, targets)
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected, equal_nan=True)
    assert not gradient[0, :4500].any()
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("rows", "chunk", "expected"),
    [
        (0, 4, []),
        (3, 4, [(0, 3, 0)]),
        (8, 4, [(0, 4, 0), (4, 8, 0)]),
        (9, 4, [(0, 4, 0), (4, 8, 0), (5, 9, 3)]),
        (1000, 8192, [(0, 1000, 0)]),
        (1500, 8192, [(0, 1500, 0)]),
        (9000, 8192, [(0, 8192, 0), (7976, 9000, 216)]),
        (19_661, 8192, [(0, 8192, 0), (8192, 16_384, 0), (15_565, 19_661, 819)]),
        (3000, 2000, [(0, 2000, 0), (1976, 3000, 24)]),
        (3900, 2000, [(0, 2000, 0), (1900, 3900, 100)]),
    ],
)
def test_parts_of_few_sizes(rows: int, chunk: int, expected: list[tuple[int, int, int]]) -> None:
    assert [(part.start, part.stop, repeated) for part, repeated in parts(rows, chunk)] == expected


def test_sizes_of_many_rows() -> None:
    sizes = {part.stop - part.start for rows in range(16_385, 24_577, 37) for part, _ in parts(rows, 8192)}
    assert sizes == {1024 * number for number in range(1, 9)}
