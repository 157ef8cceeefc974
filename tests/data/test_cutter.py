"""Cutting documents into blocks, against the rule written down one document at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data.blocks import (
    Block,
    ConversationTokens,
    conversation_block,
    encode_block,
    join_blocks,
    select_documents,
    slice_documents,
    text_block,
    token_dtype,
)
from rxt_dist.data.cutter import BlockCutter

U16 = token_dtype(1000)


def naive_blocks(lengths: list[int], documents: int, size: int) -> list[list[int]]:
    """Numbers of the documents of every block."""
    blocks: list[list[int]] = [[]]
    for number, length in enumerate(lengths):
        used = sum(2 * lengths[other] for other in blocks[-1])
        if blocks[-1] and (len(blocks[-1]) == documents or used + 2 * length > size):
            blocks.append([])
        blocks[-1].append(number)
    return [block for block in blocks if block]


def make(kind: str, lengths: list[int]) -> list[Block]:
    """A block of one document for every length, all tokens of which are its number."""
    blocks: list[Block] = []
    for number, length in enumerate(lengths):
        tokens = np.full(length, number)
        if kind == "text":
            blocks.append(text_block([tokens], U16))
        else:
            segments = [tokens[:1], np.array([number, *tokens[1:]])]
            marks = [np.zeros(1, np.uint8), np.full(length, 3, np.uint8)] if number % 3 == 0 else None
            blocks.append(conversation_block([ConversationTokens(segments, [1, 2], marks)], U16))
    return blocks


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["text", "conversations"]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    documents=st.integers(1, 6),
    size=st.integers(1, 60).map(lambda half: 2 * half),
    data=st.data(),
)
def test_blocks_follow_the_rule_however_documents_are_grouped(
    kind: str, lengths: list[int], documents: int, size: int, data: st.DataObject
) -> None:
    singles = make(kind, lengths)
    cutter = BlockCutter(documents, size)
    found: list[Block] = []
    place = 0
    while place < len(singles):
        count = data.draw(st.integers(1, len(singles) - place))
        found += cutter.add(join_blocks(singles[place : place + count]))
        place += count
    found += cutter.finish()
    assert not list(cutter.finish())
    sizes = [len(single.tokens) for single in singles]
    expected = naive_blocks(sizes, documents, size)
    assert [[int(block.tokens[0]), block.num_documents] for block in found] == [
        [numbers[0], len(numbers)] for numbers in expected
    ]
    for block, numbers in zip(found, expected, strict=True):
        wanted = join_blocks([singles[number] for number in numbers])
        assert encode_block(block) == encode_block(wanted)


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_selecting_and_slicing_keep_documents_whole(kind: str) -> None:
    singles = make(kind, [3, 1, 4, 1, 5, 9, 2, 6])
    joined = join_blocks(singles)
    keep = np.array([0, 1, 1, 0, 0, 0, 1, 1], bool)
    chosen = select_documents(joined, keep)
    assert encode_block(chosen) == encode_block(join_blocks([singles[i] for i in (1, 2, 6, 7)]))
    assert select_documents(joined, np.ones(8, bool)) is joined
    assert select_documents(joined, np.zeros(8, bool)).num_documents == 0
    for start in range(8):
        for stop in range(start + 1, 9):
            part = slice_documents(joined, start, stop)
            assert encode_block(part) == encode_block(join_blocks(singles[start:stop]))


def test_a_block_may_be_exactly_full() -> None:
    cutter = BlockCutter(documents=5, size=4)
    found = [*cutter.add(join_blocks(make("text", [1, 1, 1, 2, 1]))), *cutter.finish()]
    assert [block.num_documents for block in found] == [2, 1, 1, 1]
