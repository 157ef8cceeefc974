"""The hot operations of a step, each beside an eager reference that computes it in the plainest way.

Shape legend: N tokens, B sequences, H heads, d head width, D embedding width, F hidden width, E experts,
K experts a token visits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from rxt_dist.errors import ConfigError
from rxt_dist.kernels.activation import activate, activate_rows
from rxt_dist.kernels.attention import AttentionLayout, attention, set_attention_backend
from rxt_dist.kernels.attention_triton import longest_keys
from rxt_dist.kernels.combine import combine_rows
from rxt_dist.kernels.cross_entropy import linear_cross_entropy
from rxt_dist.kernels.grouped_gemm import grouped_linear
from rxt_dist.kernels.norm import rms_norm, rms_norm_branch
from rxt_dist.kernels.permute import repeat_permuted
from rxt_dist.model.moe import ExpertOrder, Router
from rxt_dist.model.rope import Rotation

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step; the default is RxT-Alpha with 256 sequences."""

    tokens: int = 65_536
    seq_len: int = 256
    slots: int = 256
    width: int = 256
    inner: int = 128
    """Width of all heads of an attention together."""
    head_widths: tuple[int, ...] = (16, 32, 64, 128)
    hidden: int = 768
    experts: int = 36
    top_k: int = 6
    expert_hidden: int = 384
    vocabulary: int = 20_000
    chunks: tuple[int, ...] = (2048, 4096, 8192, 16_384)
    """Rows whose logits live at once."""


SMALL = Sizes(
    tokens=192, seq_len=48, slots=16, width=32, inner=32, head_widths=(16, 32), hidden=48, experts=6, top_k=2,
    expert_hidden=24, vocabulary=96, chunks=(64,),
)  # fmt: skip
"""Sizes for tests and CPUs."""


@dataclass(frozen=True)
class Case:
    """One operation on random inputs.

    Attributes:
        inputs: fp32, off special values; their gradients are compared.
        ours: what training runs, on inputs in its dtype; exact: the same in plain operations.
        products: operations of the matrix products of the forward pass.
        backward_products: those of the backward pass; None: twice as many.
        constant_bytes: what else is read in each pass: indexes, tables.
        moved: numbers in the dtype that the two passes have to read and write; None: all inputs and results.
    """

    inputs: Tensors
    ours: Callable[..., torch.Tensor]
    exact: Callable[..., torch.Tensor]
    products: int = 0
    backward_products: int | None = None
    constant_bytes: int = 0
    moved: tuple[int, int] | None = None


Operation = Callable[[], Case]


def operations(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Operation]]:
    """Name and maker of every operation; attention once a backend that ``device`` and ``dtype`` allow."""
    for width in sizes.head_widths:
        for backend in usable_backends(device, dtype):
            if backend == "triton" and max(sizes.seq_len, sizes.slots) > longest_keys(width):
                continue  # it would leave them to another backend
            for kind in ("self", "causal", "cross"):
                name = f"attention {kind} {backend} d={width}"
                yield name, _attention(sizes, device, dtype, backend, kind, width)
    yield "rms_norm", lambda: _rms_norm(sizes, device)
    yield "rms_norm and residual", lambda: _residual_norm(sizes, device)
    yield "rope", lambda: _rope(sizes, device)
    yield "swiglu", lambda: _swiglu(sizes, device)
    yield "repeat", lambda: _repeat(sizes, device)
    yield "swiglu of experts", lambda: _expert_swiglu(sizes, device)
    yield "combine", lambda: _combine(sizes, device)
    yield "grouped_linear", lambda: _grouped_linear(sizes, device)
    yield "router", lambda: _router(sizes, device)
    yield "route and permute", lambda: _routing(sizes, device)
    for chunk in sizes.chunks:
        yield f"linear_cross_entropy C={chunk}", _cross_entropy(sizes, device, chunk)
    yield "embedding", lambda: _embedding(sizes, device)


def usable_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Attention backends that can run here."""
    found = []
    for name in ("triton", "flash", "varlen", "sdpa"):
        try:
            set_attention_backend(name, device, dtype)
        except ConfigError:
            continue
        found.append(name)
    return found


def _random(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device)


def _lengths(sizes: Sizes) -> list[int]:
    """About ``tokens`` tokens in sequences of half to all of ``seq_len``."""
    spread = torch.linspace(sizes.seq_len // 2, sizes.seq_len, max(1, sizes.tokens * 4 // 3 // sizes.seq_len))
    return [int(length) for length in spread]


def _boundaries(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _attention(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, backend: str, kind: str, width: int
) -> Operation:
    def make() -> Case:
        lengths = _lengths(sizes)
        keys = [sizes.slots] * len(lengths) if kind == "cross" else lengths
        cu_q = _boundaries(lengths, device)
        cu_k = _boundaries(keys, device) if kind == "cross" else cu_q
        layout = AttentionLayout(cu_q, cu_k, max(lengths), max(keys))
        heads = sizes.inner // width
        rows = (sum(lengths), sum(keys), sum(keys))
        pairs = sum(q * k for q, k in zip(lengths, keys, strict=True))
        if kind == "causal":
            pairs = sum(q * (q + 1) // 2 for q in lengths)

        def ours(*inputs: torch.Tensor) -> torch.Tensor:
            return attention(*inputs, layout, causal=kind == "causal")

        def exact(*inputs: torch.Tensor) -> torch.Tensor:
            return padded_attention(*inputs, lengths, keys, causal=kind == "causal")

        set_attention_backend(backend, device, dtype)
        inputs = [_random(count, heads, width, device=device) for count in rows]
        return Case(inputs, ours, exact, products=4 * pairs * heads * width)

    return make


def padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], keys: list[int], *, causal: bool
) -> torch.Tensor:
    """Softmax over whole rows of masked scores."""
    query = pad_sequence(list(q.split(lengths)), batch_first=True).transpose(1, 2)  # [B, H, Tq, d]
    key, value = (pad_sequence(list(x.split(keys)), batch_first=True).transpose(1, 2) for x in (k, v))
    columns = torch.arange(key.shape[2], device=q.device)
    seen = (columns < torch.tensor(keys, device=q.device)[:, None])[:, None, None]
    if causal:
        seen = seen & (columns <= columns[:, None])
    scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
    out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    real = torch.arange(out.shape[2], device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    return out.transpose(1, 2)[real]


def _rms_norm(sizes: Sizes, device: torch.device) -> Case:
    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * weight

    x = _random(sizes.tokens, sizes.width, device=device)
    return Case([x, 1 + 0.1 * _random(sizes.width, device=device)], rms_norm, exact)


def _residual_norm(sizes: Sizes, device: torch.device) -> Case:
    """A stream and its norm, added up."""

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stream, normed = rms_norm_branch(x, weight)
        return stream + normed

    whole = _rms_norm(sizes, device)
    return replace(whole, ours=ours, exact=lambda x, weight: x + whole.exact(x, weight))


def _rope(sizes: Sizes, device: torch.device) -> Case:
    width = sizes.head_widths[0]
    positions = torch.arange(sizes.tokens, device=device) % sizes.seq_len
    rotation = Rotation.at(positions, width, 10_000.0)

    def exact(x: torch.Tensor) -> torch.Tensor:
        rotated = torch.complex(x[..., ::2], x[..., 1::2]) * torch.complex(rotation.cos, rotation.sin)
        return torch.stack((rotated.real, rotated.imag), dim=-1).flatten(-2)

    table_bytes = rotation.cos.numel() * rotation.cos.element_size() * 2
    x = _random(sizes.tokens, sizes.inner // width, width, device=device)
    return Case([x], rotation.apply, exact, constant_bytes=table_bytes)


def _swiglu(sizes: Sizes, device: torch.device) -> Case:
    def exact(x: torch.Tensor) -> torch.Tensor:
        value, gate = x[:, : sizes.hidden], x[:, sizes.hidden :]
        return value * gate * torch.sigmoid(gate)

    x = _random(sizes.tokens, 2 * sizes.hidden, device=device)
    return Case([x], lambda hidden: activate(hidden, "silu", gated=True), exact)


def _order(sizes: Sizes, device: torch.device) -> ExpertOrder:
    """Of random experts of every token; the first is nobody's."""
    scores = torch.rand(sizes.tokens, sizes.experts, device=device)
    scores[:, 0] = -1
    return ExpertOrder.of(scores.topk(sizes.top_k).indices, sizes.experts)


def _repeat(sizes: Sizes, device: torch.device) -> Case:
    order = _order(sizes, device)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return repeat_permuted(x, order.order, order.inverse, sizes.top_k)

    def exact(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(sizes.top_k, 0)[order.order]

    x = _random(sizes.tokens, sizes.width, device=device)
    moved = x.numel() * (1 + sizes.top_k)
    return Case([x], ours, exact, constant_bytes=order.order.numel() * 8, moved=(moved, moved))


def _expert_swiglu(sizes: Sizes, device: torch.device) -> Case:
    order = _order(sizes, device)

    def ours(hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return activate_rows(hidden, bias, order.offsets, order.expert_of_row, "silu", gated=True)

    def exact(hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        value, gate = (hidden + bias[order.expert_of_row]).chunk(2, dim=-1)
        return value * gate * torch.sigmoid(gate)

    shapes = ((sizes.tokens * sizes.top_k, 2 * sizes.expert_hidden), (sizes.experts, 2 * sizes.expert_hidden))
    inputs = [_random(*shape, device=device) for shape in shapes]
    return Case(inputs, ours, exact, constant_bytes=order.expert_of_row.numel() * 8)


def _combine(sizes: Sizes, device: torch.device) -> Case:
    order = _order(sizes, device)

    def ours(rows: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return combine_rows(
            rows, bias, weights.float(), order.order, order.inverse, order.offsets, order.expert_of_row
        )

    def exact(rows: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outputs = (rows + bias[order.expert_of_row])[order.inverse].view(*weights.shape, -1)
        return (outputs * weights[..., None]).sum(dim=1)

    shapes = (sizes.tokens * sizes.top_k, sizes.width), (sizes.experts, sizes.width)
    inputs = [_random(*shape, device=device) for shape in shapes]
    weights = torch.rand(sizes.tokens, sizes.top_k, device=device).softmax(dim=-1)
    return Case([*inputs, weights], ours, exact, constant_bytes=order.order.numel() * 16)


def _grouped_linear(sizes: Sizes, device: torch.device) -> Case:
    rows = sizes.tokens * sizes.top_k
    counts = torch.bincount(torch.randint(sizes.experts, (rows,)), minlength=sizes.experts)
    counts[-1], counts[0] = counts[-1] + counts[0], 0  # an expert without rows
    offsets = counts.cumsum(0).to(device, torch.int32)
    sections = counts.tolist()
    fan_out = 2 * sizes.expert_hidden

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return grouped_linear(x, weight, offsets)

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([part @ w.T for part, w in zip(x.split(sections), weight, strict=True)])

    weight = _random(sizes.experts, fan_out, sizes.width, device=device) / sizes.width**0.5
    inputs = [_random(rows, sizes.width, device=device), weight]
    return Case(inputs, ours, exact, products=2 * rows * sizes.width * fan_out)


def _router(sizes: Sizes, device: torch.device) -> Case:
    """From logits to the weights of the chosen experts."""
    router = Router(sizes.experts, sizes.experts, sizes.top_k)
    router.proj = torch.nn.Identity()  # type: ignore[assignment]

    def exact(logits: torch.Tensor) -> torch.Tensor:
        top = logits.softmax(-1).topk(sizes.top_k).values
        return top / top.sum(-1, keepdim=True)

    # Far enough from each other that no rounding changes who is chosen.
    ranks = _random(sizes.tokens, sizes.experts, device=device).argsort(dim=-1)
    logits = ranks.float() / 8
    # Weights and their gradient are fp32, the experts int64.
    chosen = 2 * sizes.tokens * sizes.top_k
    moved = logits.numel() + 3 * chosen, 2 * logits.numel() + 3 * chosen
    return Case([logits], lambda x: router(x).weights, exact, moved=moved)


def _routing(sizes: Sizes, device: torch.device) -> Case:
    """From router logits to rows sorted by expert, and back to weighted sums; an expert here is a factor."""
    experts, top_k = sizes.experts, sizes.top_k
    router = Router(experts, experts, top_k)
    factors = torch.linspace(0.5, 2.0, experts, device=device)
    identity = torch.eye(experts, device=device)

    def ours(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        routing = torch.func.functional_call(router, {"proj.weight": identity.to(x.dtype)}, (logits,))
        order = ExpertOrder.of(routing.experts, experts)
        rows = repeat_permuted(x, order.order, order.inverse, top_k)
        rows = rows * factors.to(x.dtype)[order.expert_of_row, None]
        return combine_rows(
            rows, None, routing.weights, order.order, order.inverse, order.offsets, order.expert_of_row
        )

    def exact(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        top, chosen = logits.softmax(-1).topk(top_k)
        weights = top / top.sum(-1, keepdim=True)
        return x * (weights * factors[chosen]).sum(-1, keepdim=True)

    x, logits = (_random(sizes.tokens, size, device=device) for size in (sizes.width, experts))
    rows = x.numel() * top_k
    # Rows are written sorted, and read back when the experts have done their work.
    moved = 2 * x.numel() + logits.numel() + 2 * rows, 2 * x.numel() + 2 * logits.numel() + 3 * rows
    return Case([x, logits], ours, exact, moved=moved)


def _cross_entropy(sizes: Sizes, device: torch.device, chunk: int) -> Operation:
    """The forward pass computes the gradients, which the backward pass scales."""

    def make() -> Case:
        targets = torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)

        def ours(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(hidden, weight, bias, targets, chunk)[0] / sizes.tokens

        def exact(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(F.linear(hidden, weight, bias), targets)

        hidden = _random(sizes.tokens, sizes.width, device=device)
        weight = _random(sizes.vocabulary, sizes.width, device=device) / sizes.width**0.5
        bias = _random(sizes.vocabulary, device=device)
        products = 3 * 2 * sizes.tokens * sizes.width * sizes.vocabulary
        numbers = 2 * (hidden.numel() + weight.numel() + bias.numel())
        return Case(
            [hidden, weight, bias], ours, exact, products, 0, targets.numel() * 8, moved=(numbers, numbers)
        )

    return make


def _embedding(sizes: Sizes, device: torch.device) -> Case:
    tokens = torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)
    weight = _random(sizes.vocabulary, sizes.width, device=device)
    rows = sizes.tokens * sizes.width
    return Case(
        [weight],
        lambda table: F.embedding(tokens, table),
        lambda table: table[tokens],
        constant_bytes=tokens.numel() * tokens.element_size(),
        moved=(2 * rows, rows + weight.numel()),
    )
