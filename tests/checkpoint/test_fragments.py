"""Cutting parameters into canonical tensors, and those into what a rank owns."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.checkpoint.fragments import CanonicalPart, canonical_parts, clip_fragment
from rxt_dist.config import load_model_config
from rxt_dist.model import build_model


def cuts_of(size: int, draw: st.DrawFn) -> list[int]:
    return [0, *sorted(draw(st.lists(st.integers(0, size), max_size=4))), size]


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_runs_of_any_division_cover_every_part_once(data: st.DataObject) -> None:
    """A parameter holds parts one after the other; ranks own runs of it that begin anywhere."""
    rows = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    width = data.draw(st.integers(1, 3))
    parameter = torch.arange(sum(rows) * width, dtype=torch.float32)
    parts, start = [], 0
    for number, count in enumerate(rows):
        parts.append(CanonicalPart(f"part{number}", (count, width), start, count * width))
        start += count * width
    rebuilt = {part.name: torch.full((part.numel,), -1.0) for part in parts}
    covered = 0
    for low, high in pairwise(cuts_of(parameter.numel(), data.draw)):
        for part in parts:
            fragment = clip_fragment(part, low, parameter[low:high])
            if fragment is None:
                continue
            assert fragment.values.numel() > 0
            assert fragment.numel == part.numel
            rebuilt[part.name][fragment.offset :][: fragment.values.numel()] = fragment.values
            covered += fragment.values.numel()
    assert covered == parameter.numel()
    assert torch.equal(torch.cat(list(rebuilt.values())), parameter)


def test_a_fragment_is_a_view() -> None:
    """Loading writes through it into the optimizer."""
    values = torch.zeros(10)
    fragment = clip_fragment(CanonicalPart("part", (4,), 3, 4), 0, values)
    assert fragment is not None
    fragment.values.fill_(1.0)
    assert values.tolist() == [0.0] * 3 + [1.0] * 4 + [0.0] * 3


@pytest.mark.parametrize("model", ["tiny", "micro"])
def test_canonical_parts_are_the_unfused_tensors(model: str) -> None:
    config = load_model_config(model).model_copy(update={"vocab_size": 50})
    network = build_model(config, 0)
    parameters = dict(network.named_parameters())
    parts = canonical_parts(network)
    assert parts.keys() == parameters.keys()
    names = [part.name for found in parts.values() for part in found]
    assert len(set(names)) == len(names)
    for name, found in parts.items():
        assert sum(part.numel for part in found) == parameters[name].numel()
        assert all(part.shape[1:] == parameters[name].shape[1:] for part in found)

    fused = "decoder.layers.0.attention.qkv.weight"
    prefix = fused.removesuffix("qkv.weight")
    head = config.embed_dim // config.decoder.heads
    query, kv = (
        count * head for count in (config.decoder.attention.query_heads, config.decoder.attention.kv_heads)
    )
    expected = [("q", query), ("k", kv), ("v", kv)]
    assert [(p.name, p.shape) for p in parts[fused]] == [
        (f"{prefix}{letter}.weight", (rows, config.embed_dim)) for letter, rows in expected
    ]
    assert not [name for name in names if ".qkv." in name or ".kv." in name or ".in_proj." in name]
