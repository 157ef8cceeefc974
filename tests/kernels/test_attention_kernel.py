"""The attention kernel against a plain loop over sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rxt_dist.errors import ConfigError
from rxt_dist.kernels.attention import AttentionLayout, attention, set_attention_backend

WIDTH = 8
HEADS = [(4, 4), (4, 2), (4, 1), (2, 4), (1, 4), (1, 1)]


def boundaries(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def layout_of(
    queries: list[int], keys: list[int] | None = None, index: torch.Tensor | None = None
) -> AttentionLayout:
    cu_q = boundaries(queries)
    cu_k = cu_q if keys is None else boundaries(keys)
    longest = max(queries, default=0) if keys is None else max(keys, default=0)
    return AttentionLayout(cu_q, cu_k, max(queries, default=0), longest, index)


def by_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float
) -> torch.Tensor:
    """One query row and head at a time, from the definition."""
    if layout.key_index is not None:
        k, v = k[layout.key_index], v[layout.key_index]
    heads_q, heads_k = q.shape[1], k.shape[1]
    heads = max(heads_q, heads_k)
    cu_q, cu_k = layout.cu_q.tolist(), layout.cu_k.tolist()
    rows = []
    for group in range(len(cu_q) - 1):
        length_q, length_k = cu_q[group + 1] - cu_q[group], cu_k[group + 1] - cu_k[group]
        for i in range(length_q):
            seen = length_k - length_q + i + 1 if causal else length_k
            outputs = []
            for head in range(heads):
                head_q, head_k = (
                    (head, head * heads_k // heads_q) if heads_q >= heads_k else (head % heads_q, head)
                )
                keys = k[cu_k[group] : cu_k[group] + max(seen, 0), head_k]
                values = v[cu_k[group] : cu_k[group] + max(seen, 0), head_k]
                if seen <= 0:
                    outputs.append(q.new_zeros(q.shape[2]))
                    continue
                scores = torch.softmax(keys @ q[cu_q[group] + i, head_q] * scale, dim=0)
                outputs.append(scores @ values)
            rows.append(torch.stack(outputs))
    return torch.stack(rows) if rows else q.new_zeros(0, heads, q.shape[2])


def compare(
    heads: tuple[int, int], layout: AttentionLayout, rows_k: int, causal: bool, scale: float | None = None
) -> None:
    torch.manual_seed(0)
    rows_q = int(layout.cu_q[-1])
    shapes = [(rows_q, heads[0]), (rows_k, heads[1]), (rows_k, heads[1])]
    ours = [torch.randn(*shape, WIDTH, requires_grad=True) for shape in shapes]
    plain = [x.detach().double().requires_grad_() for x in ours]
    out = attention(*ours, layout, causal=causal, scale=scale)
    expected = by_loop(*plain, layout, causal, 1 / math.sqrt(WIDTH) if scale is None else scale)
    assert out.shape == (rows_q, max(heads), WIDTH)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    if expected.requires_grad:  # the loop of a layout without rows touches no input
        (expected * weights).sum().backward()
    for ours_x, plain_x in zip(ours, plain, strict=True):
        assert ours_x.grad is not None
        expected_grad = torch.zeros_like(plain_x) if plain_x.grad is None else plain_x.grad
        torch.testing.assert_close(ours_x.grad.double(), expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 1, 7], [4, 4, 4], [3], [0, 6, 0, 2]])
def test_self_attention(heads: tuple[int, int], causal: bool, lengths: list[int]) -> None:
    compare(heads, layout_of(lengths), sum(lengths), causal)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("keys", [[6, 2, 9], [4, 4, 4], [0, 3, 2], [2, 0, 0]])
def test_cross_attention(heads: tuple[int, int], keys: list[int]) -> None:
    compare(heads, layout_of([3, 5, 1], keys), sum(keys), causal=False)


@pytest.mark.parametrize("keys", [[6, 9, 4], [3, 5, 1], [1, 0, 4]])
def test_causal_cross_attention_is_aligned_to_the_last_key(keys: list[int]) -> None:
    compare((4, 2), layout_of([3, 5, 1], keys), sum(keys), causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_key_index(causal: bool) -> None:
    index = torch.tensor([0, 2, 3, 9, 8])  # rows 1, 4..7 do not exist; order is the caller's
    compare((4, 2), layout_of([3, 4, 3], [3, 0, 2], index), 10, causal)


def test_rows_after_the_last_group_are_neither_read_nor_given_a_gradient() -> None:
    index = torch.tensor([0, 2, 2, 3, 9, 8, 5])  # a row twice; 8 and 5 are read by nobody
    cut = layout_of([3, 4, 3], [3, 0, 2], index[:5])
    slack = replace(layout_of([3, 4, 3], [3, 0, 2], index), slack=True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, 2, WIDTH, requires_grad=True) for _ in range(3))
    found = []
    for layout in (cut, slack):
        out = attention(q, k, v, layout, causal=False)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, expected)
    assert not found[1][2][[5, 8]].any()


def test_scale() -> None:
    compare((2, 2), layout_of([4, 3]), 7, causal=True, scale=0.3)


@pytest.mark.parametrize("queries", [[], [0], [0, 0], [2, 3]])
def test_without_rows_everything_stays_connected(queries: list[int]) -> None:
    compare((2, 2), layout_of(queries, [0] * len(queries)), 0, causal=False)
    compare((2, 4), layout_of(queries, [0] * len(queries)), 0, causal=True)


def test_queries_without_rows_but_with_keys() -> None:
    compare((2, 2), layout_of([0, 0], [3, 4]), 7, causal=False)


def test_fully_masked_rows_are_exact_zeros() -> None:
    q, k, v = (torch.randn(4, 2, WIDTH) for _ in range(3))
    index = torch.tensor([2, 3])
    out = attention(q, k, v, layout_of([2, 2], [0, 2], index), causal=False)
    assert torch.equal(out[:2], torch.zeros(2, 2, WIDTH))
    assert out[2:].abs().min() > 0


def test_index_tensors_are_built_once_for_all_layers() -> None:
    layout = layout_of([3, 5])
    q = torch.randn(8, 2, WIDTH)
    attention(q, q, q, layout, causal=False)
    view = layout.padded(8, 8)
    attention(q, q, q, layout, causal=True)
    assert layout.padded(8, 8) is view


def test_moving_a_layout_keeps_it_self_attention() -> None:
    moved = layout_of([3, 5]).to("cpu")
    assert moved.cu_k is moved.cu_q
    crossed = layout_of([1], [2], torch.tensor([0, 1])).to("cpu")
    assert crossed.cu_k is not crossed.cu_q
    assert crossed.key_index is not None


def test_auto_on_cpu_is_sdpa() -> None:
    assert set_attention_backend("auto", torch.device("cpu"), torch.float32) == "sdpa"
    assert set_attention_backend("sdpa", torch.device("cpu"), torch.bfloat16) == "sdpa"


@pytest.mark.parametrize("name", ["triton", "flash", "varlen"])
def test_gpu_backends_are_refused_on_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"attention_backend: '{name}' needs a CUDA device.*usable: sdpa"):
        set_attention_backend(name, torch.device("cpu"), torch.bfloat16)


def test_fp32_is_refused_by_half_precision_backends() -> None:
    with pytest.raises(ConfigError, match="found cuda and float32"):
        set_attention_backend("varlen", torch.device("cuda"), torch.float32)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="flash-attn"):
        set_attention_backend("flash", torch.device("cuda"), torch.bfloat16)


def test_unknown_backend_names_the_valid_ones() -> None:
    with pytest.raises(
        ConfigError, match="unknown backend 'flesh'; valid: auto, triton, flash, varlen, sdpa"
    ):
        set_attention_backend("flesh", torch.device("cpu"), torch.float32)


def test_flash_is_for_bf16_alone() -> None:
    with pytest.raises(ConfigError, match="'flash' needs a CUDA device and bf16, found cuda and float16"):
        set_attention_backend("flash", torch.device("cuda"), torch.float16)


def test_no_softmax_runs_over_nothing() -> None:
    """Some versions of torch give NaN for a row that sees no key, so no mask row may be empty."""
    view = layout_of([2, 2, 1], [0, 3, 1]).padded(5, 4)
    assert view.key_mask is not None
    assert view.key_mask.any(-1).all()
    mask, sees_any = view.causal_mask
    assert mask.any(-1).all()
    assert sees_any[:, 0, :, 0].tolist() == [[False, False], [True, True], [True, True]]
