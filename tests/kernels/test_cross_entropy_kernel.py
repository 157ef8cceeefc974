"""Chunked cross-entropy against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rxt_dist.kernels.cross_entropy import linear_cross_entropy

M, D, V = 13, 16, 37


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
