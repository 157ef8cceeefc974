"""GPU backends against the padded view in fp32; run on a CUDA machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rxt_dist.errors import ConfigError
from rxt_dist.kernels.attention import AttentionLayout, attention, set_attention_backend
from rxt_dist.kernels.cross_entropy import linear_cross_entropy
from rxt_dist.kernels.grouped_gemm import grouped_linear
from rxt_dist.kernels.norm import rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
WIDTH = 16


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    yield
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=CUDA).cumsum(0).to(torch.int32)


def run(
    inputs: list[torch.Tensor], layout: AttentionLayout, causal: bool, factor: torch.Tensor
) -> list[torch.Tensor]:
    for x in inputs:
        x.grad = None
    out = attention(*inputs, layout, causal=causal)
    (out * factor.to(out.dtype)).sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in inputs)]


def assert_near(ours: torch.Tensor, exact: torch.Tensor, tolerance: float = 0.02) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1e-6)


@pytest.mark.parametrize("backend", ["triton", "flash", "varlen"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [
        ([70, 1, 129], None, True),
        ([70, 1, 129], None, False),
        ([0, 64, 0, 3], None, True),
        ([70, 1, 129], [40, 200, 1], False),
        ([70, 1, 129], [40, 0, 1], False),
        ([200], [64], False),
        ([3, 5], [6, 5], True),
    ],
)
def test_attention_backend(
    backend: str, heads: tuple[int, int], queries: list[int], keys: list[int] | None, causal: bool
) -> None:
    try:
        set_attention_backend(backend, CUDA, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    cu_q = boundaries(queries)
    cu_k = cu_q if keys is None else boundaries(keys)
    key_lengths = queries if keys is None else keys
    rows_k = sum(key_lengths)
    layout = AttentionLayout(cu_q, cu_k, max(queries), max(key_lengths))
    shapes = [(sum(queries), heads[0]), (rows_k, heads[1]), (rows_k, heads[1])]
    half = [torch.randn(*shape, WIDTH, device=CUDA).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().float().requires_grad_() for x in half]
    factor = torch.randn(sum(queries), max(heads), WIDTH, device=CUDA)
    ours = run(half, layout, causal, factor)
    set_attention_backend("sdpa", CUDA, torch.float32)
    for left, right in zip(ours, run(exact, layout, causal, factor), strict=True):
        assert_near(left, right)


@pytest.mark.parametrize("backend", ["triton", "flash", "varlen"])
def test_rows_after_the_last_group_have_no_gradient(backend: str) -> None:
    """Whatever the memory held where the backend puts its gradients."""
    try:
        set_attention_backend(backend, CUDA, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    rows, keys = 4096, [1, 0, 30]
    index = torch.randint(rows, (50_000,), device=CUDA)
    layout = AttentionLayout(boundaries([5, 2, 7]), boundaries(keys), 7, 30, index, slack=True)
    q = torch.randn(14, 4, WIDTH, device=CUDA).bfloat16().requires_grad_()
    k, v = (torch.randn(rows, 4, WIDTH, device=CUDA).bfloat16().requires_grad_() for _ in range(2))
    out = attention(q, k, v, layout, causal=False)
    # What is freed now is what the backward pass gets.
    del_me = [torch.full((50_000, 4, WIDTH), torch.nan, device=CUDA).bfloat16() for _ in range(4)]
    del del_me
    out.sum().backward()
    read = torch.zeros(rows, dtype=torch.bool, device=CUDA)
    read[index[: sum(keys)]] = True
    for x in (k, v):
        assert torch.isfinite(x.grad).all()
        assert not x.grad[~read].any()
        assert x.grad[read].any()


@pytest.mark.parametrize("counts", [[30, 0, 100, 2], [0, 0, 0, 132], [0, 0, 0, 0]])
def test_grouped_linear(counts: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 64, device=CUDA).bfloat16().requires_grad_()
    weight = torch.randn(4, 96, 64, device=CUDA).bfloat16().requires_grad_()
    offsets = torch.tensor(counts, device=CUDA).cumsum(0).to(torch.int32)
    out = grouped_linear(x, weight, offsets)
    out.sum().backward()
    exact_x, exact_weight = (t.detach().float().requires_grad_() for t in (x, weight))
    parts = zip(exact_x.split(counts), exact_weight, strict=True)
    expected = torch.cat([part @ w.T for part, w in parts])
    expected.sum().backward()
    for ours, exact in ((out, expected), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert ours.shape == exact.shape
        if exact.numel():
            assert_near(ours.detach().float(), exact.detach())
    for expert, count in enumerate(counts):
        assert count or not weight.grad[expert].any()


def test_no_host_sync() -> None:
    """The kernels of a step queue work without waiting for the device."""
    x = torch.randn(64, 32, device=CUDA).bfloat16().requires_grad_()
    weight = torch.randn(4, 64, 32, device=CUDA).bfloat16().requires_grad_()
    offsets = torch.tensor([10, 10, 40, 64], device=CUDA, dtype=torch.int32)
    head = torch.randn(128, 64, device=CUDA).bfloat16().requires_grad_()
    scale = torch.ones(64, device=CUDA).bfloat16().requires_grad_()
    targets = torch.randint(0, 128, (64,), device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = rms_norm(grouped_linear(x, weight, offsets), scale)
        loss, _ = linear_cross_entropy(hidden, head, None, targets, 16)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
