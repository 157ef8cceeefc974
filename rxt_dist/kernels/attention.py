"""Attention over packed sequences: one function, four backends, no padding visible to the caller.

Shape legend: Nq query rows, Nk key/value rows, Hq query heads, Hk key/value heads, H = max(Hq, Hk),
d head width, B attention groups (one a sequence), Tq/Tk longest query/key group.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rxt_dist.errors import ConfigError
from rxt_dist.kernels import triton_support
from rxt_dist.kernels.attention_triton import longest_keys, short_attention
from rxt_dist.kernels.compilation import compiles
from rxt_dist.kernels.permute import take_rows
from rxt_dist.kernels.triton_support import uses_triton

BackendName = Literal["triton", "flash", "varlen", "sdpa"]
# flash-attn's wheels are commonly built for bf16 alone, and then give wrong numbers in fp16.
_HALF_TYPES = {
    "triton": (torch.bfloat16, torch.float16),
    "flash": (torch.bfloat16,),
    "varlen": (torch.bfloat16, torch.float16),
}


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Which rows attend to which: query rows ``cu_q[b]:cu_q[b+1]`` see key rows ``cu_k[b]:cu_k[b+1]``.

    Attributes:
        cu_q: int32 [B+1], boundaries of the query rows of each group; ``cu_q[B] == Nq``.
        cu_k: int32 [B+1], boundaries of the key rows of each group. Use the same tensor object as
            ``cu_q`` for self-attention: that is what lets a backend take its causal fast path.
        max_q: rows of the longest query group.
        max_k: rows of the longest key group (0 where no group has a key).
        key_index: int64 [cu_k[B]], rows of the key and value tensors that exist, in ``cu_k`` order;
            None where all of them do. It may name a row more than once.
        slack: ``key_index`` goes on after ``cu_k[B]`` with rows that nobody reads, since only the device
            knows where they begin. Backend "sdpa" waits to learn it.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    key_index: torch.Tensor | None = None
    slack: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionLayout:
        """A copy on ``device``; the identity of ``cu_q`` and ``cu_k`` is kept."""
        cu_q = self.cu_q.to(device, non_blocking=non_blocking)
        same = self.cu_k is self.cu_q
        cu_k = cu_q if same else self.cu_k.to(device, non_blocking=non_blocking)
        index = None if self.key_index is None else self.key_index.to(device, non_blocking=non_blocking)
        return AttentionLayout(cu_q, cu_k, self.max_q, self.max_k, index, self.slack)

    def padded(self, rows_q: int, rows_k: int) -> _PaddedView:
        """Index tensors of the padded view, built on first use and shared by all layers."""
        view: _PaddedView | None = self.__dict__.get("_view")
        if view is None:
            view = _PaddedView(self, rows_q, rows_k)
            self.__dict__["_view"] = view
        return view


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: AttentionLayout,
    *,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention inside each group of ``layout``.

    Args:
        q: [Nq, Hq, d]; k, v: [Nk, Hk, d], any floating dtype the chosen backend takes.
        layout: the groups; with a ``key_index`` only those rows of ``k`` and ``v`` exist.
        causal: the last query of a group sees all its keys, each earlier one a key fewer.
        scale: factor of the scores, 1/sqrt(d) when None.

    Returns:
        [Nq, H, d] in the dtype of ``q``. With Hq >= Hk query head h reads key/value head
        ``h * Hk // Hq``; with Hq < Hk (reverse sparse query attention) key/value head g is read by
        query head ``g % Hq``. A query that sees no key gives 0.
    """
    if layout.key_index is not None:
        k = k.index_select(0, layout.key_index)
        v = v.index_select(0, layout.key_index)
    if layout.slack:
        # Backends leave the gradient of rows that nobody reads as they find it in memory.
        unread = torch.arange(k.shape[0], device=k.device) >= layout.cu_k[-1]
        k, v = (rows.masked_fill(unread.view(-1, 1, 1), 0.0) for rows in (k, v))
    if q.shape[1] < k.shape[1]:
        q = q.repeat(1, k.shape[1] // q.shape[1], 1)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return _no_rows(q, k, v)
    causal = causal and layout.max_q > 1  # a group's only query sees all: no mask while generating
    return _backend(q, k, v, layout, causal, 1.0 / math.sqrt(q.shape[2]) if scale is None else scale)


def set_attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> BackendName:
    """Choose the backend of :func:`attention` for this process; call before the first step, and after
    :func:`~rxt_dist.kernels.compilation.set_compile`.

    Args:
        name: "triton", "flash", "varlen", "sdpa", or "auto" for the first of these that works here. "triton"
            takes short groups alone, and leaves the longer ones to the next that works.
        device: where the model runs; dtype: the dtype of its activations.

    Returns:
        The chosen backend's name.

    Raises:
        ConfigError: the backend asked for is unknown, not installed, or cannot run here.
    """
    global _backend
    if name not in ("auto", *_PREFERENCE):
        valid = ", ".join(("auto", *_PREFERENCE))
        raise ConfigError(f"runtime.attention_backend: unknown backend {name!r}; valid: {valid}")
    obstacles = {key: _obstacle(key, device, dtype) for key in _PREFERENCE}
    usable = [key for key, obstacle in obstacles.items() if obstacle is None]
    chosen = usable[0] if name == "auto" else next(key for key in _PREFERENCE if key == name)
    if chosen not in usable:
        found = f"{name!r} {obstacles[chosen]}; usable: {', '.join(usable)}"
        raise ConfigError(f"runtime.attention_backend: {found}")
    if chosen == "triton":
        _backend = _short_or(_MAKERS[usable[1]]())
    else:
        _backend = _MAKERS[chosen]()
    return chosen


def _obstacle(name: BackendName, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot be used here; None if it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda" or dtype not in _HALF_TYPES[name]:
        return f"needs a CUDA device and bf16, found {device.type} and {str(dtype).removeprefix('torch.')}"
    if name == "triton" and not triton_support.HAS_TRITON:
        return "needs the package triton, which is not installed"
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn (extra 'cuda'), which is not installed"
    if name == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch.nn.attention.varlen, which torch {torch.__version__} does not have"
    return None


def _no_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Zeros [Nq, H, d] that stay connected to all three inputs, so that their parameters get gradients."""
    return torch.zeros_like(q) + 0.0 * (q.sum() + k.sum() + v.sum())


class _PadRows(torch.autograd.Function):
    """Rows [N, ...] to their places in zeros [places, ...]; gather and scatter swap in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor, places: int) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(places, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place), None, None


class _PaddedView:
    """Where the rows of a layout lie in a [B, T] grid, and which grid keys a query may see.

    Nothing here reads a tensor's value on the host. A side without padding (``place_* is None``) is a
    plain reshape. Padded keys and values are zeros, so a query that may see only them gives zero.
    """

    def __init__(self, layout: AttentionLayout, rows_q: int, rows_k: int) -> None:
        self.groups = layout.cu_q.shape[0] - 1
        self.width_q = max(layout.max_q, 1)
        self.width_k = max(layout.max_k, 1)
        self.causal_without_mask = layout.cu_k is layout.cu_q
        self._lengths_q = layout.cu_q.diff()
        self._lengths_k = layout.cu_k.diff()
        self.place_q = self._places(layout.cu_q, rows_q, self.width_q)
        if layout.cu_k is layout.cu_q:
            self.place_k = self.place_q
        else:
            self.place_k = self._places(layout.cu_k, rows_k, self.width_k)

    def _places(self, cu: torch.Tensor, rows: int, width: int) -> torch.Tensor | None:
        if rows == self.groups * width:
            return None
        row = torch.arange(rows, device=cu.device, dtype=cu.dtype)
        group = torch.searchsorted(cu[1:], row, right=True)
        return group * width + (row - cu.index_select(0, group))

    @cached_property
    def key_mask(self) -> torch.Tensor | None:
        """bool [B, 1, 1, Tk], True where a key exists; None if there is no padding.

        A group without keys sees its (zero) padding: a softmax over nothing would be NaN on some
        versions of torch.
        """
        if self.place_k is None:
            return None
        lengths = self._lengths_k[:, None]
        column = torch.arange(self.width_k, device=lengths.device)
        return ((column < lengths) | (lengths == 0))[:, None, None, :]

    @cached_property
    def causal_mask(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [B, 1, Tq, Tk] of visible keys, and bool [B, 1, Tq, 1] of queries that see any.

        Queries that see nothing get a full mask row here and are zeroed by the second tensor.
        """
        lengths_q, lengths_k = self._lengths_q[:, None, None], self._lengths_k[:, None, None]
        row = torch.arange(self.width_q, device=lengths_q.device)[:, None]
        column = torch.arange(self.width_k, device=lengths_q.device)
        visible = (column <= row + lengths_k - lengths_q) & (column < lengths_k)
        sees_any = visible.any(dim=-1, keepdim=True)
        return (visible | ~sees_any)[:, None], sees_any[:, None]


def _grid(x: torch.Tensor, place: torch.Tensor | None, groups: int, width: int) -> torch.Tensor:
    """[N, heads, d] -> [B, heads, T, d]."""
    padded: torch.Tensor = x if place is None else _PadRows.apply(x, place, groups * width)  # type: ignore[no-untyped-call]
    return padded.reshape(groups, width, *x.shape[1:]).transpose(1, 2)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float
) -> torch.Tensor:
    if layout.slack:
        read = int(layout.cu_k[-1])
        k, v = k[:read], v[:read]
    view = layout.padded(q.shape[0], k.shape[0])
    if k.shape[1] < q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    query = _grid(q, view.place_q, view.groups, view.width_q)
    key = _grid(k, view.place_k, view.groups, view.width_k)
    value = _grid(v, view.place_k, view.groups, view.width_k)
    if causal and not view.causal_without_mask:
        mask, sees_any = view.causal_mask
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale) * sees_any
    elif causal:
        # Padding is on the right: a real query only looks left, at real keys.
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=view.key_mask, scale=scale)
    rows: torch.Tensor = out.transpose(1, 2).flatten(0, 1)
    if view.place_q is not None:
        rows = take_rows(rows, view.place_q)
    return rows


_Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionLayout, bool, float], torch.Tensor]


def _make_sdpa() -> _Backend:
    if not compiles():
        return _sdpa
    # Its index tensors are kept with the layout, which compiled code cannot do.
    eager: _Backend = torch.compiler.disable(_sdpa)  # type: ignore[no-untyped-call]
    return eager


def _make_flash() -> _Backend:
    from rxt_dist.kernels.flash import flash_attention

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float
    ) -> torch.Tensor:
        groups = (layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)
        return flash_attention(q, k, v, *groups, causal=causal, scale=scale)

    return run


def _make_varlen() -> _Backend:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal_arguments: dict[bool, dict[str, Any]] = (
        {False: {}, True: {"window_size": (-1, 0)}}
        if "window_size" in known
        else {False: {}, True: {"is_causal": True}}
    )
    takes_scale, takes_gqa = "scale" in known, "enable_gqa" in known

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float
    ) -> torch.Tensor:
        arguments = dict(causal_arguments[causal])
        if takes_scale:
            arguments["scale"] = scale
        else:
            q = q * (scale * math.sqrt(q.shape[2]))
        if takes_gqa:
            arguments["enable_gqa"] = True
        elif k.shape[1] < q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out = varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, **arguments)
        assert isinstance(out, torch.Tensor)
        return out

    return run


def _short_or(long: _Backend) -> _Backend:
    """Groups of few keys to the Triton kernels, others to ``long``."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float
    ) -> torch.Tensor:
        if layout.max_k > longest_keys(q.shape[2]) or not uses_triton(q):
            return long(q, k, v, layout, causal, scale)
        return short_attention(q, k, v, layout.cu_q, layout.cu_k, causal=causal, scale=scale)

    return run


_PREFERENCE: tuple[BackendName, ...] = ("triton", "flash", "varlen", "sdpa")  # of "auto"
_MAKERS: dict[BackendName, Callable[[], _Backend]] = {
    "flash": _make_flash,
    "varlen": _make_varlen,
    "sdpa": _make_sdpa,
}
_backend: _Backend = _sdpa
