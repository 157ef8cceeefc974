"""Triton kernels of attention in bf16 against fp32 (compiled: test_layers_gpu.py); needs a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.attention_by_group import attention_by_group

from rxt_dist.kernels.attention import AttentionLayout, attention, set_attention_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
Tensors = list[torch.Tensor]

Groups = tuple[list[int], list[int] | None]
STORIES = [16 + 37 * i % 241 for i in range(24)]
CASES: dict[str, tuple[Groups, tuple[int, int], int, bool]] = {
    "sequences": (([256] * 16, None), (8, 8), 16, False),
    "causal": (([256] * 16, None), (8, 8), 16, True),
    "stories": ((STORIES, None), (8, 8), 16, True),
    "slots": ((STORIES, [256] * 24), (8, 8), 16, False),
    "memory": (([256] * 24, [*STORIES[:-1], 0]), (8, 8), 16, False),
    "shared keys": ((STORIES, None), (8, 2), 16, True),
    "fewer query heads": ((STORIES, None), (2, 8), 16, True),
    "many queries": (([1, 1000, 0, 300], [256, 255, 9, 64]), (4, 4), 16, True),
    "wider": (([128, 127, 1, 64], None), (4, 2), 32, True),
    "widest": (([32, 31, 1, 5], None), (4, 2), 128, True),
    "few": (([16, 3, 1], None), (2, 2), 64, True),
}


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    set_attention_backend("triton", CUDA, torch.bfloat16)
    yield
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)


def layout_of(groups: Groups) -> AttentionLayout:
    queries, keys = groups
    cu_q = torch.tensor([0, *queries], device=CUDA).cumsum(0).to(torch.int32)
    cu_k = cu_q if keys is None else torch.tensor([0, *keys], device=CUDA).cumsum(0).to(torch.int32)
    return AttentionLayout(cu_q, cu_k, max(queries), max(queries if keys is None else keys))


def fused_rows(layout: AttentionLayout, heads: tuple[int, int], width: int) -> Tensors:
    """Queries, keys and values in bf16, as parts of one tensor where they have the same rows."""
    torch.manual_seed(0)
    rows_q, rows_k = int(layout.cu_q[-1]), int(layout.cu_k[-1])
    if rows_q == rows_k:
        rows = torch.randn(rows_q, heads[0] + 2 * heads[1], width, device=CUDA).bfloat16()
        return list(rows.split([heads[0], heads[1], heads[1]], dim=1))
    rows = torch.randn(rows_k, 2 * heads[1], width, device=CUDA).bfloat16()
    return [torch.randn(rows_q, heads[0], width, device=CUDA).bfloat16(), *rows.split(heads[1], dim=1)]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, causal: bool
) -> Tensors:
    """Result and gradients."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, layout, causal=causal)
    return [out.detach(), *torch.autograd.grad(out, inputs, factor_like(out))]


def factor_like(out: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(1)
    return torch.randn(out.shape, device=CUDA, generator=generator).bfloat16().to(out.dtype)


def exactly(inputs: Tensors, layout: AttentionLayout, causal: bool) -> Tensors:
    full = [x.detach().float().requires_grad_() for x in inputs]
    q, k, v = full
    if q.shape[1] < k.shape[1]:
        q = q.repeat(1, k.shape[1] // q.shape[1], 1)
    out = attention_by_group(q, k, v, layout, causal=causal, scale=q.shape[2] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, full, factor_like(out))]


def fill_memory(like: Tensors) -> None:
    """Have the memory that is free hold no numbers, so that results that are not written are seen."""
    for x in like * 3:
        torch.full_like(x, torch.nan)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_fp32(case: tuple[Groups, tuple[int, int], int, bool]) -> None:
    groups, heads, width, causal = case
    layout = layout_of(groups)
    inputs = fused_rows(layout, heads, width)
    expected = exactly(inputs, layout, causal)
    fill_memory(inputs)
    found = attend(*inputs, layout, causal)
    fill_memory(inputs)
    again = attend(*inputs, layout, causal)
    for ours, right, same in zip(found, expected, again, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.float() - right).abs().max() <= 0.015 * right.abs().max()
        assert torch.equal(ours, same)


def test_no_host_sync_and_no_copy_of_keys_and_values() -> None:
    layout = layout_of(CASES["causal"][0])
    inputs = fused_rows(layout, (8, 8), 16)
    attend(*inputs, layout, True)  # compiled
    factor = torch.ones(inputs[0].shape, device=CUDA, dtype=torch.bfloat16)
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attention(*inputs, layout, causal=True)
        size = out.numel() * out.element_size()
        level = out.numel() // 16 * 4
        assert torch.cuda.max_memory_allocated() - before <= size + level + 1024
        torch.autograd.grad(out, inputs, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
