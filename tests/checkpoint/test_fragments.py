"""Cutting parameters into canonical tensors, and those into what a rank owns."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rxt_dist.checkpoint.fragments import (
    Fragment,
    FragmentLoadPlanner,
    FragmentSavePlanner,
    add_fragment,
    clip_fragment,
)
from rxt_dist.config import load_model_config
from rxt_dist.model import build_model
from rxt_dist.model.canonical import Box, CanonicalPart, canonical_parts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def cuts_of(size: int, draw: st.DrawFn) -> list[int]:
    return [0, *sorted(draw(st.lists(st.integers(0, size), max_size=4))), size]


def box_of(whole: torch.Tensor, offsets: tuple[int, ...], sizes: torch.Size) -> torch.Tensor:
    """A view of a part of ``whole``."""
    return whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """The shape of a tensor and a box of it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True))
    return shape, Box(starts, sizes)


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_runs_of_any_division_cover_every_part_once(data: st.DataObject) -> None:
    """A parameter holds boxes of tensors one after the other; ranks own runs of it that begin anywhere."""
    parts, start = [], 0
    for number, (shape, box) in enumerate(data.draw(st.lists(boxes(), min_size=1, max_size=3))):
        parts.append(CanonicalPart(f"part{number}", shape, start, box))
        start += box.numel
    parameter = torch.arange(start, dtype=torch.float32) + 1
    rebuilt = {part.name: torch.zeros(part.shape) for part in parts}
    flat = {part.name: torch.zeros(part.numel) for part in parts}
    for low, high in pairwise(cuts_of(parameter.numel(), data.draw)):
        for part in parts:
            fragment = clip_fragment(part, low, parameter[low:high])
            if fragment is None:
                continue
            assert fragment.size() == torch.Size(part.shape)
            assert len(fragment.chunks) <= 2 * len(part.shape) - 1
            for offsets, values in fragment.chunks:
                box_of(rebuilt[part.name], offsets, values.shape).add_(values)
            for (offset,), values in fragment.flat().chunks:
                flat[part.name][offset : offset + len(values)] += values
    for part in parts:
        expected = torch.zeros(part.shape)
        place = box_of(expected, part.box.starts, torch.Size(part.box.sizes))
        place.copy_(part.of(parameter).view(part.box.sizes))
        assert torch.equal(rebuilt[part.name], expected)
        assert torch.equal(flat[part.name], expected.flatten())
        assert torch.equal(part.taken_from(expected), part.of(parameter))


def test_a_fragment_is_a_view() -> None:
    """Loading writes through it into the optimizer."""
    values = torch.zeros(10)
    part = CanonicalPart("part", (4, 2), 3, Box((0, 1), (4, 1)))
    fragment = clip_fragment(part, 0, values)
    assert fragment is not None
    for _, box in (*fragment.chunks, *fragment.flat().chunks):
        box.add_(1.0)
    assert values.tolist() == [0.0] * 3 + [2.0] * 4 + [0.0] * 3


def test_fragments_of_one_tensor_come_together() -> None:
    found: dict[str, Fragment] = {}
    for row in (2, 0):
        add_fragment(found, "key", Fragment((3, 2), (((row, 0), torch.full((1, 2), float(row))),)))
    assert [offsets for offsets, _ in found["key"].chunks] == [(2, 0), (0, 0)]
    assert found["key"].at(MetadataIndex("key", (0, 0))).tolist() == [[0.0, 0.0]]


def test_checkpoints_that_stored_tensors_flat_are_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(2, 3, 4)
    writer = FileSystemWriter(tmp_path)
    entries = {
        "flat": Fragment.run(24, 0, whole.view(-1)),
        "shaped": Fragment((2, 3, 4), (((0, 0, 0), whole),)),
    }
    save(entries, storage_writer=writer, planner=FragmentSavePlanner(), no_dist=True)
    for key in entries:
        read = torch.zeros(2 * 2 * 4)
        part = CanonicalPart("part", (2, 3, 4), 0, Box((0, 1, 0), (2, 2, 4)))
        fragment = clip_fragment(part, 0, read)
        assert fragment is not None
        wanted = {key: fragment.flat() if key == "flat" else fragment}
        load(wanted, storage_reader=FileSystemReader(tmp_path), planner=FragmentLoadPlanner(), no_dist=True)
        assert torch.equal(read.view(2, 2, 4), whole[:, 1:])


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
