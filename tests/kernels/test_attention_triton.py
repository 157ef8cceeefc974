"""The Triton kernels of attention, in Triton's interpreter, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.attention_by_group import attention_by_group
from helpers.interpreter import interpreter  # noqa: F401

from rxt_dist.kernels import attention as attention_kernel
from rxt_dist.kernels import attention_triton
from rxt_dist.kernels.attention import AttentionLayout, attention
from rxt_dist.kernels.attention_triton import longest_keys

WIDTH = 16
REAL_TILES = {
    name: getattr(attention_triton, name) for name in ("_FORWARD_TILE", "_BACKWARD_TILE", "_MOST_KEY_NUMBERS")
}
Tensors = list[torch.Tensor]


def refuse(*_: Any) -> torch.Tensor:
    raise AssertionError("went to the backend of long groups")


@pytest.fixture(autouse=True)
def _small_tiles(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Tiles that small groups do not fit into, and memory that shows where nothing was written."""
    monkeypatch.setattr(attention_triton, "_FORWARD_TILE", (16, 16))
    monkeypatch.setattr(attention_triton, "_BACKWARD_TILE", (16, 16))
    monkeypatch.setattr(attention_triton, "_MOST_KEY_NUMBERS", 64 * WIDTH)
    monkeypatch.setattr(attention_kernel, "_backend", attention_kernel._short_or(refuse))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))


def layout_of(queries: list[int], keys: list[int] | None) -> AttentionLayout:
    def boundaries(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    cu_q = boundaries(queries)
    cu_k = cu_q if keys is None else boundaries(keys)
    return AttentionLayout(cu_q, cu_k, max(queries), max(queries if keys is None else keys))


def random_rows(layout: AttentionLayout, heads: tuple[int, int], width: int = WIDTH) -> Tensors:
    torch.manual_seed(0)
    rows_q, rows_k = int(layout.cu_q[-1]), int(layout.cu_k[-1])
    shapes = [(rows_q, heads[0], width), (rows_k, heads[1], width), (rows_k, heads[1], width)]
    return [torch.randn(shape) for shape in shapes]


def outcome(run: Any, inputs: Tensors) -> Tensors:
    """Result and gradients, in fp64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs)
    torch.manual_seed(1)
    factor = torch.randn(out.shape).to(out.dtype)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, inputs, factor))]


def compare(
    inputs: Tensors,
    layout: AttentionLayout,
    causal: bool,
    scale: float | None = None,
    tolerance: float = 1e-5,
) -> Tensors:
    """Errors are measured by the largest number of each result, or 1."""
    factor = inputs[0].shape[2] ** -0.5 if scale is None else scale
    found = outcome(lambda *x: attention(*x, layout, causal=causal, scale=scale), inputs)
    exact = [x.double() for x in inputs]
    expected = outcome(lambda *x: attention_by_group(*x, layout, causal=causal, scale=factor), exact)
    for ours, right in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - right).abs().max() <= tolerance * right.abs().max().clamp_min(1.0)
    return found


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "causal"),
    [
        ((2, 2), [16, 1, 33, 0], None, True),
        ((1, 1), [16, 1, 36, 0], None, False),
        ((1, 1), [70, 1], [33, 64], False),  # more queries than the programs of a group take at once
        ((4, 2), [5, 20, 0], [0, 7, 17], False),
        ((3, 1), [5, 33, 20], [20, 17, 0], True),
    ],
)
def test_groups(heads: tuple[int, int], queries: list[int], keys: list[int] | None, causal: bool) -> None:
    layout = layout_of(queries, keys)
    compare(random_rows(layout, heads), layout, causal)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_widths(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "_MOST_KEY_NUMBERS", 32 * width)
    layout = layout_of([20, 3], None)
    compare(random_rows(layout, (1, 1), width), layout, causal=True)


def test_tiles_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REAL_TILES.items():
        monkeypatch.setattr(attention_triton, name, value)
    layout = layout_of([70, 130], [256, 100])
    compare(random_rows(layout, (1, 1)), layout, causal=True)


def test_half_precision() -> None:
    """In fp16: the interpreter multiplies no matrices of bf16."""
    layout = layout_of([20, 3, 17], None)
    compare([x.half() for x in random_rows(layout, (2, 1))], layout, causal=True, tolerance=2e-3)


def test_parts_of_wider_rows() -> None:
    layout = layout_of([20, 9], None)
    torch.manual_seed(0)
    wide = torch.randn(29, 7, WIDTH)
    parts = list(wide.split([2, 2, 3], dim=1))
    parts[2] = parts[2][:, :2]
    compare(parts, layout, causal=True)
    odd = torch.randn(29, 2 * WIDTH + 3)[:, 1 : 2 * WIDTH + 1].view(29, 2, WIDTH)
    spread = torch.randn(29, 2, WIDTH, 2)[..., 0]
    compare([parts[0], odd, spread], layout, causal=False)


def test_queries_that_see_no_key_and_keys_without_queries_give_exact_zeros() -> None:
    layout = layout_of([20, 0, 5], [3, 30, 0])
    out, grad_q, grad_k, grad_v = compare(random_rows(layout, (2, 2)), layout, causal=True)
    for x in (out, grad_q):
        assert not x[:17].any()
        assert x[17:20].any()
        assert not x[20:].any()
    for x in (grad_k, grad_v):
        assert x[:3].any()
        assert not x[3:].any()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scales(scale: float) -> None:
    layout = layout_of([20, 3], None)
    compare(random_rows(layout, (1, 1)), layout, causal=True, scale=scale)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_large_scores(sign: int, causal: bool) -> None:
    """Far beyond what an exponent can hold, and all of one sign: absent keys would have the other one."""
    layout = layout_of([7], [23])
    q, k, v = random_rows(layout, (1, 1))
    compare([20 * q.abs(), sign * 20 * k.abs(), v], layout, causal, tolerance=1e-3)


def test_numbers_that_are_none_stay_in_their_group() -> None:
    layout = layout_of([3, 18, 2], None)
    inputs = random_rows(layout, (2, 2))
    clean = outcome(lambda *x: attention(*x, layout, causal=True), inputs)
    for x in inputs:
        x[3:21] = torch.nan
    found = outcome(lambda *x: attention(*x, layout, causal=True), inputs)
    for ours, right in zip(found, clean, strict=True):
        assert torch.equal(ours[:3], right[:3])
        assert torch.equal(ours[21:], right[21:])
        assert ours[3:21].isnan().all()


@pytest.mark.parametrize(
    ("width", "longest"), [(8, 0), (16, 256), (24, 0), (32, 128), (64, 64), (128, 32), (256, 0)]
)
def test_long_groups_and_other_widths_go_elsewhere(
    width: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_triton, "_MOST_KEY_NUMBERS", 4096)
    assert longest_keys(width) == longest
    layout = layout_of([2], [longest + 1])
    with pytest.raises(AssertionError, match="went to the backend of long groups"):
        attention(*random_rows(layout, (2, 2), width), layout, causal=False)
