"""Sequence layouts and memories."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rxt_dist.kernels.attention import attention
from rxt_dist.model import Memory, SequenceLayout


def test_from_lengths() -> None:
    layout = SequenceLayout.from_lengths([3, 0, 2])
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 3
    assert layout.positions.tolist() == [0, 1, 2, 0, 1]
    assert layout.sequence_ids.tolist() == [0, 0, 0, 2, 2]
    assert layout.positions.dtype == layout.sequence_ids.dtype == torch.int64
    assert (layout.num_sequences, layout.num_tokens) == (3, 5)


@pytest.mark.parametrize("lengths", [[], np.array([], dtype=np.int32), [0], np.array([0, 0])])
def test_without_tokens(lengths: list[int]) -> None:
    layout = SequenceLayout.from_lengths(lengths)
    assert layout.num_tokens == 0
    assert layout.max_seqlen == 0
    assert layout.num_sequences == len(lengths)


def test_numpy_lengths_of_any_integer_type() -> None:
    layout = SequenceLayout.from_lengths(np.array([2, 1], dtype=np.uint16))
    assert layout.cu_seqlens.tolist() == [0, 2, 3]


def test_self_attention_groups_are_one_object() -> None:
    layout = SequenceLayout.from_lengths([3, 2])
    groups = layout.self_attention
    assert groups is layout.self_attention
    assert groups.cu_q is groups.cu_k is layout.cu_seqlens


def test_to_keeps_everything() -> None:
    layout = SequenceLayout.from_lengths([3, 2]).to("cpu")
    assert layout.positions.tolist() == [0, 1, 2, 0, 1]
    assert layout.self_attention.cu_k is layout.self_attention.cu_q


def read(memory: Memory, tokens: int) -> torch.Tensor:
    """What uniform attention gives: the mean of the rows that each token reads, [N, D]."""
    rows = memory.states[0][:, None]
    return attention(torch.zeros(tokens, 1, rows.shape[-1]), rows, rows, memory.layout, causal=False)[:, 0]


def test_sequences_read_their_own_encoder_outputs() -> None:
    layout = SequenceLayout.from_lengths([3, 1])
    layers = torch.randn(2, 4, 8)
    out = read(Memory.of_sequence(layers, layout), 4)
    torch.testing.assert_close(out[:3], layers[0, :3].mean(0).expand(3, 8))
    torch.testing.assert_close(out[3], layers[0, 3])


def test_sequences_read_their_own_lane() -> None:
    layout = SequenceLayout.from_lengths([2, 0, 3])
    stm = torch.randn(2, 3, 5, 8)
    out = read(Memory.of_stm(stm, layout), 5)
    torch.testing.assert_close(out, stm[0].mean(1)[layout.sequence_ids])


def test_one_lane_is_read_by_all_sequences() -> None:
    layout = SequenceLayout.from_lengths([2, 0, 3])
    stm = torch.randn(2, 1, 5, 8)
    memory = Memory.of_stm(stm, layout)
    assert memory.states.shape == (2, 5, 8)  # not expanded
    torch.testing.assert_close(read(memory, 5), stm[0, 0].mean(0).expand(5, 8))
