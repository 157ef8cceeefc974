import dataclasses

import numpy as np
import pytest
import torch
from dataset_builder import ArrayPieces
from hypothesis import given
from hypothesis import strategies as st

from rxt_dist.data import batch as batch_module
from rxt_dist.data.batch import MaskPlan, build_text_batch, count_masked, count_pack
from rxt_dist.data.order import Pack
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.randomness import derive_key, fold_in, uniform

MASK_ID = 99  # not a token of the pieces
LENGTHS, SUPERVISED = [5, 1, 3, 8], [4, 0, 1, 5]


def pack_of(pieces, epochs=None):
    return Pack(
        np.array(pieces, np.int64), np.array(epochs if epochs is not None else [0] * len(pieces), np.int64)
    )


def build(pieces, epochs=None, probability=0.3, key=11):
    source = ArrayPieces(LENGTHS, SUPERVISED)
    return build_text_batch(source, pack_of(pieces, epochs), MaskPlan(key, probability), MASK_ID)


def per_token(batch, pack_pieces, epochs):
    """{(epoch, piece, position): (token, masked token, token key)}"""
    result = {}
    for n, (i, position) in enumerate(
        zip(batch.layout.sequence_ids.tolist(), batch.layout.positions.tolist(), strict=True)
    ):
        values = (int(batch.tokens[n]), int(batch.masked_tokens[n]), int(batch.token_keys[n]))
        result[(epochs[i], pack_pieces[i], position)] = values
    return result


def test_contents_of_a_batch():
    batch = build([3, 1, 0])
    assert batch.tokens.tolist() == [*range(3000, 3008), 1000, *range(5)]
    assert batch.layout.cu_seqlens.tolist() == [0, 8, 9, 14]
    assert batch.layout.positions.tolist() == [*range(8), 0, *range(5)]
    assert batch.next_targets.tolist() == [3003, 3004, 3005, 3006, 3007, 1, 2, 3, 4]
    assert batch.next_index.tolist() == [2, 3, 4, 5, 6, 9, 10, 11, 12]
    torch.testing.assert_close(batch.tokens[batch.next_index + 1], batch.next_targets)
    masked = batch.masked_tokens == MASK_ID
    assert torch.nonzero(masked).flatten().tolist() == batch.masked_index.tolist()
    assert 0 < len(batch.masked_index) < 14
    torch.testing.assert_close(batch.tokens[masked], batch.masked_targets)
    torch.testing.assert_close(batch.tokens[~masked], batch.masked_tokens[~masked])
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        assert isinstance(value, SequenceLayout) or value.dtype == torch.int64


def test_mask_follows_its_definition():
    key, probability = 5, 0.4
    batch = build([0, 3], epochs=[2, 7], probability=probability, key=key)
    for (epoch, piece, position), (token, masked, _) in per_token(batch, [0, 3], [2, 7]).items():
        piece_key = fold_in(fold_in(derive_key(key, "mask"), epoch), piece)
        expected = uniform(fold_in(piece_key, position)) < probability
        assert masked == (MASK_ID if expected else token)


def test_masks_and_keys_do_not_depend_on_packing():
    together = per_token(build([0, 1, 2, 3, 0]), [0, 1, 2, 3, 0], [0] * 5)
    for pieces in ([3], [2, 0], [1, 3, 2]):
        for visit, values in per_token(build(pieces), pieces, [0] * len(pieces)).items():
            assert together[visit] == values


def test_masks_and_keys_differ_by_epoch_piece_position_and_stage():
    batch = build([0, 0, 3, 3], epochs=[0, 1, 0, 1])
    assert len(set(batch.token_keys.tolist())) == len(batch.tokens)
    assert set(batch.token_keys.tolist()).isdisjoint(build([0, 3], key=12).token_keys.tolist())
    source, everything = ArrayPieces([400] * 3), pack_of([0, 0, 1], [0, 1, 0])
    masked = build_text_batch(source, everything, MaskPlan(1, 0.5), MASK_ID).masked_tokens == MASK_ID
    first, next_epoch, other_piece = masked.split(400)
    assert not torch.equal(first, next_epoch)
    assert not torch.equal(first, other_piece)


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_the_masked_fraction_is_the_probability(probability):
    count = count_masked(MaskPlan(3, probability), pack_of(range(100)), np.full(100, 1000))
    assert abs(count / 100_000 - probability) < 5 * np.sqrt(probability * (1 - probability) / 100_000)


def test_nothing_masked_and_everything_masked():
    nothing, everything = build([0, 3], probability=0.0), build([0, 3], probability=1.0)
    assert nothing.masked_index.shape == nothing.masked_targets.shape == (0,)
    assert nothing.masked_index.dtype == torch.int64
    torch.testing.assert_close(nothing.masked_tokens, nothing.tokens)
    assert (everything.masked_tokens == MASK_ID).all()
    torch.testing.assert_close(everything.masked_targets, everything.tokens)


def test_no_supervised_tokens():
    batch = build([1, 1])
    assert batch.next_index.shape == batch.next_targets.shape == (0,)
    assert batch.next_index.dtype == batch.next_targets.dtype == torch.int64
    assert batch.tokens.tolist() == [1000, 1000]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.15, 0.7]),
    st.integers(1, 20),
)
def test_counts_equal_what_the_batch_holds(pieces, probability, chunk):
    source, plan = ArrayPieces(LENGTHS, SUPERVISED), MaskPlan(9, probability)
    pack = pack_of(pieces, list(range(len(pieces))))
    batch = build_text_batch(source, pack, plan, MASK_ID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "_COUNT_CHUNK", chunk)
        counts = count_pack(source, pack, plan)
    assert counts == {
        "tokens": len(batch.tokens),
        "masked": len(batch.masked_index),
        "next": len(batch.next_index),
    }


def test_moving_a_batch_keeps_its_contents():
    batch = build([0, 3])
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        value = getattr(moved, field.name)
        assert (value.positions if isinstance(value, SequenceLayout) else value).is_meta
    assert batch.to("cpu").tokens.tolist() == batch.tokens.tolist()
