"""Our operators over flash-attn's kernels, with plain PyTorch in the place of those."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.fx.experimental._config as symbols
from helpers.plain_flash import plain_flash
from torch._dynamo.testing import CompileCounterWithBackend

from rxt_dist.kernels import attention as kernels
from rxt_dist.kernels.attention import AttentionLayout, attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="where flash-attn is, it is tested itself"
)


@pytest.fixture(scope="module", autouse=True)
def _flash() -> Iterator[None]:
    with plain_flash():
        yield


def layout_of(queries: list[int], keys: list[int] | None) -> AttentionLayout:
    cu_q, cu_k = (
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (queries, keys or queries)
    )
    return AttentionLayout(cu_q, cu_q if keys is None else cu_k, max(queries), max(keys or queries))


def inputs_of(layout: AttentionLayout, heads: tuple[int, int], width: int) -> list[torch.Tensor]:
    """Queries, and keys and values as views of one projection."""
    torch.manual_seed(0)
    rows_q, rows_k = int(layout.cu_q[-1]), int(layout.cu_k[-1])
    q = torch.randn(rows_q, heads[0], width, requires_grad=True)
    both = torch.randn(rows_k, 2 * heads[1], width, requires_grad=True)
    return [q, both]


def results(
    call: Any, inputs: list[torch.Tensor], layout: AttentionLayout, causal: bool
) -> list[torch.Tensor]:
    q, both = inputs
    out = call(q, *both.chunk(2, dim=1), layout, causal=causal)
    factor = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()
    return [out.detach(), *torch.autograd.grad((out * factor).sum(), inputs)]


@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [([7, 1, 5], None, True), ([7, 1, 5], None, False), ([7, 1], [3, 9], False), ([3, 2], [5, 2], True)],
)
def test_as_the_padded_view(
    width: int,
    heads: tuple[int, int],
    queries: list[int],
    keys: list[int] | None,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = layout_of(queries, keys)
    inputs = inputs_of(layout, heads, width)
    found = results(attention, inputs, layout, causal)
    monkeypatch.setattr(kernels, "_backend", kernels._sdpa)
    for ours, other in zip(found, results(attention, inputs, layout, causal), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_one_graph_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols, "use_duck_shape", False)  # as where training compiles
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, dynamic=True, fullgraph=True, backend=counter)
    for queries in ([7, 4, 5], [3, 6], [9, 2, 2, 8]):
        layout = layout_of(queries, None)
        inputs = inputs_of(layout, (4, 2), 8)
        expected = results(attention, inputs, layout, True)
        for ours, eager in zip(results(compiled, inputs, layout, True), expected, strict=True):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_operators_are_not_dispatched_in_python() -> None:
    layout = layout_of([7, 4], None)
    inputs = inputs_of(layout, (4, 2), 8)
    files = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            files.add(Path(frame.f_code.co_filename))

    sys.setprofile(note)
    try:
        results(attention, inputs, layout, True)
    finally:
        sys.setprofile(None)
    assert {"plain_flash.py", "flash.py"} <= {file.name for file in files}
    assert not [file for file in files if file.parent.name == "_library"]
