"""The loss of heads on a CUDA machine, at sizes of training, against fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rxt_dist.kernels.compilation import set_compile
from rxt_dist.kernels.cross_entropy import linear_cross_entropy
from rxt_dist.kernels.triton_support import HAS_TRITON

if HAS_TRITON:
    from rxt_dist.kernels import cross_entropy_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
FACTOR = 0.37


def head(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden rows, weight, bias and targets, half of them hit."""
    torch.manual_seed(0)
    shapes = ((rows, width), (vocabulary, width), (vocabulary,))
    inputs = [torch.randn(shape, device=CUDA) for shape in shapes]
    inputs[1] /= width**0.5
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    targets = torch.randint(vocabulary, (rows,), device=CUDA)
    if rows:
        targets[::2] = F.linear(*(x.detach() for x in inputs)).argmax(1)[::2]
    return inputs, targets


def run(inputs: list[torch.Tensor], targets: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    loss, correct = linear_cross_entropy(*inputs, targets, chunk)
    return [loss.detach(), correct, *torch.autograd.grad(loss, inputs, loss.new_tensor(FACTOR))]


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk", "dtype"),
    [
        (5000, 256, 20_000, 2048, torch.bfloat16),
        (1500, 512, 65_536, 1024, torch.bfloat16),
        (700, 104, 1003, 300, torch.bfloat16),  # rows that begin at no multiple of 16 bytes
        (700, 104, 1003, 300, torch.float16),
        (500, 64, 9001, 300, torch.float32),
        (1, 64, 9001, 300, torch.bfloat16),
    ],
)
def test_value_and_gradients(rows: int, width: int, vocabulary: int, chunk: int, dtype: torch.dtype) -> None:
    inputs, targets = head(rows, width, vocabulary, dtype)
    loss, correct, *gradients = run(inputs, targets, chunk)
    for ours, again in zip((loss, correct, *gradients), run(inputs, targets, chunk), strict=True):
        assert torch.equal(ours, again)
    with torch.no_grad():
        values = linear_cross_entropy(*inputs, targets, chunk)
        logits = F.linear(*inputs)
    assert torch.equal(values[0], loss)
    assert torch.equal(values[1], correct)
    # Logits have the roundings of another product here, so that a few rows change the largest one.
    assert abs(int(correct) - int((logits.argmax(1) == targets).sum())) <= rows // 200
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    torch.testing.assert_close(
        loss, expected.detach(), rtol=2e-3 if dtype != torch.float32 else 1e-5, atol=0.01
    )
    limit = 0.02 if dtype != torch.float32 else 1e-4
    for ours, theirs in zip(gradients, torch.autograd.grad(expected * FACTOR, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours.float() - theirs).abs().max() <= limit * theirs.abs().max()


def test_of_equal_logits_the_first_one_counts() -> None:
    hidden = torch.ones(4, 8, device=CUDA, dtype=torch.bfloat16)
    weight = torch.zeros(20_000, 8, device=CUDA, dtype=torch.bfloat16)
    weight[[7, 8, 15_000]] = 1.0
    for targets, hits in (([7, 7, 7, 7], 4), ([8, 15_000, 6, 19_999], 0)):
        _, correct = linear_cross_entropy(hidden, weight, None, torch.tensor(targets, device=CUDA), 4)
        assert correct == hits


def test_beside_compiled_regions() -> None:
    """A run that compiles computes the same, and what holds a head can be compiled."""
    inputs, targets = head(700, 64, 3000, torch.bfloat16)

    def doubled(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(2 * hidden, weight, bias, targets, 256)[0] * 3

    expected = torch.autograd.grad(doubled(*inputs), inputs)
    set_compile(True)
    try:
        found = torch.autograd.grad(torch.compile(doubled, dynamic=True)(*inputs), inputs)
    finally:
        set_compile(False)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_rows() -> None:
    inputs, targets = head(0, 64, 3000, torch.bfloat16)
    loss, correct, *gradients = run(inputs, targets, 256)
    assert (loss, correct) == (0, 0)
    assert not any(x.any() for x in gradients)


def test_rows_in_parts() -> None:
    """Of a vocabulary that three ranks divide."""
    torch.manual_seed(0)
    rows, parts = 300, (range(10_000), range(10_000, 19_999), range(19_999, 20_000))
    logits = (4.0 * torch.randn(rows, 20_000, device=CUDA)).bfloat16()
    targets = torch.randint(20_000, (rows,), device=CUDA)
    targets[::2] = logits.argmax(1)[::2]
    targets[7] = 19_999
    exact = logits.float().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    own = [logits[:, part.start : part.stop].contiguous() for part in parts]
    numbers = torch.empty(3, 4, 2 * rows, device=CUDA)
    for part, one, out in zip(parts, own, numbers, strict=True):
        cross_entropy_triton.score_parts(one, targets, part.start, out[:, rows:])
    normalisers, wanted, best, hits = numbers[:, :, rows:].unbind(1)
    normaliser = normalisers.logsumexp(0)
    torch.testing.assert_close(normaliser - wanted.sum(0), expected.detach(), rtol=1e-5, atol=1e-5)
    # Of ranks with equal logits the first one counts.
    hit = hits.gather(0, (best == best.max(0).values).int().argmax(0, keepdim=True)).squeeze(0)
    first = (logits == logits.max(1, keepdim=True).values).int().argmax(1)
    assert torch.equal(hit == 1, first == targets)
    for part, one in zip(parts, own, strict=True):
        cross_entropy_triton.put_gradient_of_part(one, targets, part.start, normaliser)
        gradient = exact.grad[:, part.start : part.stop]
        torch.testing.assert_close(one.float(), gradient, rtol=2.0**-7, atol=1e-7)
