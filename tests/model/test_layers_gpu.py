"""Layers that are compiled on a GPU, kernels included, against the same layers in eager mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rxt_dist.config import AttentionConfig, MoEConfig
from rxt_dist.kernels.attention import AttentionLayout, set_attention_backend
from rxt_dist.kernels.compilation import set_compile
from rxt_dist.model.feedforward import FeedForward
from rxt_dist.model.layer import Layer
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.moe import MoE
from rxt_dist.model.rope import Rotation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
WIDTH, HEAD, SLOTS = 64, 16, 32
LENGTHS = ([70, 1, 129, 40], [256, 3])
TOLERANCE = 0.02
"""Of the largest value: compiled code rounds to bf16 in other places."""

ATTENTIONS = {
    "plain": {},
    "head norms": {"qk_norm": True},
    "gated, shared keys": {"gated": True, "kv_heads": 2},
    "fewer query heads": {"query_heads": 2},
}


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    set_compile(False)
    set_attention_backend("sdpa", torch.device("cpu"), torch.float32)


def layer_of(changes: dict[str, object], *, experts: bool) -> Layer:
    attention = AttentionConfig.model_validate({"query_heads": 4, "kv_heads": 4, **changes})
    feed_forward: FeedForward | MoE
    if experts:
        moe = MoEConfig(num_experts=3, top_k=3, bias="local")  # all: no rounding decides who is chosen
        feed_forward = MoE(moe, WIDTH, 32, gated=True, activation="silu")
    else:
        feed_forward = FeedForward(WIDTH, 96, gated=True, activation="silu")
    crossed = {"cross_attention": attention, "stm_norm": True} if experts else {}
    layer = Layer(WIDTH, HEAD, attention, feed_forward, causal=experts, norm="rms", **crossed)  # type: ignore[arg-type]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer.to(CUDA).bfloat16()


def results(layer: Layer, lengths: list[int], *, rotates: bool) -> list[torch.Tensor]:
    """Output and the gradients of what the layer reads and of its parameters."""
    generator = torch.Generator(CUDA).manual_seed(len(lengths))

    def rows(count: int) -> torch.Tensor:
        found = torch.randn(count, WIDTH, device=CUDA, generator=generator).bfloat16()
        return found.requires_grad_()

    layout = SequenceLayout.from_lengths(lengths, CUDA)
    x, memory = rows(sum(lengths)), rows(SLOTS * len(lengths))
    slots = torch.arange(len(lengths) + 1, device=CUDA, dtype=torch.int32) * SLOTS
    reads = AttentionLayout(layout.cu_seqlens, slots, layout.max_seqlen, SLOTS)
    rotation = Rotation.at(layout.positions, HEAD, 10_000.0) if rotates else None
    crosses = layer.cross_attention is not None
    out, _ = layer(x, layout.self_attention, rotation, *((memory, reads) if crosses else ()))
    factor = torch.randn(out.shape, device=CUDA, generator=generator)
    wanted = [x, *([memory] if crosses else []), *layer.parameters()]
    return [out, *torch.autograd.grad((out * factor).sum(), wanted)]


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("changes", ATTENTIONS.values(), ids=ATTENTIONS)
def test_compiled(changes: dict[str, object], experts: bool, rotates: bool) -> None:
    torch.manual_seed(0)
    layer = layer_of(changes, experts=experts)
    compared = []
    for compiles in (False, True):
        set_compile(compiles)
        set_attention_backend("auto", CUDA, torch.bfloat16)
        compared.append([results(layer, lengths, rotates=rotates) for lengths in LENGTHS])
    for eager, compiled in zip(*compared, strict=True):
        for right, found in zip(eager, compiled, strict=True):
            assert torch.isfinite(found).all()
            assert (found - right).abs().max() <= TOLERANCE * right.abs().max()
