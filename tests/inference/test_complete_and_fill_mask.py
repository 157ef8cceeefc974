"""Continuation of texts and filling in of masked tokens, against the components alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inference_samples import (
    BOS,
    EOS,
    FIRST_WORD,
    MASK,
    SEQ_LEN,
    VARIANTS,
    VOCAB,
    bytes_tokenizer,
    model_config,
    prefer,
    random_ids,
    sample_model,
    sample_stm,
    words,
    words_tokenizer,
)

from rxt_dist.errors import CheckpointError, ConfigError, DataError
from rxt_dist.inference import Sampling, complete, fill_mask
from rxt_dist.interchange.pretrained import Pretrained
from rxt_dist.model import Memory, SequenceLayout
from rxt_dist.model.stm import initial_stm

ALL = frozenset({"encoder", "decoder", "mlm_head", "memory_attention"})


def pretrained(
    name: str = "moe", stm: torch.Tensor | None = None, components: frozenset[str] = ALL
) -> Pretrained:
    return Pretrained(sample_model(VARIANTS[name]), words_tokenizer(), components, stm)


@pytest.mark.parametrize("name", ["moe", "stateless", "no-rope"])
@pytest.mark.parametrize("memory", ["stored", "drawn", "none"])
def test_a_continuation_is_that_of_plain_decoding(name: str, memory: str) -> None:
    stored = sample_stm(1) if memory == "stored" else None
    found = pretrained(name, stored)
    prefer(found.model, EOS, -1.0)
    stm = initial_stm(found.model.config, 4) if memory == "drawn" else stored
    ids = [BOS, *random_ids(5, 1)]
    start = len(ids)
    while len(ids) < start + 10 and EOS not in ids:
        layout = SequenceLayout.from_lengths([len(ids)])
        read = None if stm is None else Memory.of_stm(stm, layout)
        with torch.no_grad():
            hidden = found.model.decoder(torch.tensor(ids), layout, read).hidden[-1]
            ids.append(int(found.model.decoder.lm_head(hidden).argmax()))
    text = complete(found, words(ids[1:start]), max_tokens=10, seed=4, memory=memory != "none")
    expected = [token for token in ids[start:] if token >= FIRST_WORD]
    assert "".join(text) == words(expected)
    assert len(expected) > 5


def test_a_continuation_ends_at_the_longest_sequence_and_is_drawn_by_seed() -> None:
    found = pretrained()
    prefer(found.model, EOS, -1e4)
    start = words(random_ids(6, 1))
    sampling = Sampling(temperature=1.0)
    one, same, other = ("".join(complete(found, start, sampling=sampling, seed=s)) for s in (1, 1, 2))
    assert one == same != other
    assert len(one.split()) <= SEQ_LEN - 7
    assert len("".join(complete(found, start)).split()) > SEQ_LEN // 2
    with pytest.raises(
        DataError, match=rf"has {SEQ_LEN} tokens with \[BOS\]; at most {SEQ_LEN - 1} leave room"
    ):
        complete(found, words(random_ids(SEQ_LEN - 1, 1)))
    with pytest.raises(ConfigError, match="max_tokens: found 0; valid: 1 or more"):
        complete(found, start, max_tokens=0)


def test_masked_tokens_get_the_probabilities_of_the_mlm_head() -> None:
    found = pretrained()
    first, middle, last = random_ids(2, 1), random_ids(3, 2), random_ids(1, 3)
    ids = [BOS, *first, MASK, *middle, MASK, MASK, *last, EOS]
    text = f"{words(first)} [MASK] {words(middle)} [MASK] [MASK] {words(last)}"
    with torch.no_grad():
        hidden = found.model.encoder(torch.tensor(ids), SequenceLayout.from_lengths([len(ids)]))[-1]
        head = found.model.mlm_head
        expected = F.linear(head(hidden), head.weight, head.bias).softmax(dim=-1)
    answers = fill_mask(found, text, top=VOCAB)
    assert len(answers) == 3
    for place, candidates in zip([3, 7, 8], answers, strict=True):
        assert sorted(c.token for c in candidates) == list(range(VOCAB))
        values = [c.probability for c in candidates]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx([float(expected[place, c.token]) for c in candidates], abs=1e-6)
        assert all(c.text == f"w{c.token}" for c in candidates if c.token >= FIRST_WORD)
    assert [c.token for c in fill_mask(found, text, top=2)[1]] == [c.token for c in answers[1][:2]]


def test_the_space_before_a_masked_token_is_part_of_it() -> None:
    model = sample_model(model_config(vocab_size=267))
    found = Pretrained(model, bytes_tokenizer(), ALL, None)
    assert fill_mask(found, "a [MASK] b") == fill_mask(found, "a[MASK] b")
    assert fill_mask(found, "a  [MASK] b") != fill_mask(found, "a[MASK] b") != fill_mask(found, "a[MASK]b")


def test_bad_texts_and_numbers_are_refused() -> None:
    found = pretrained()
    with pytest.raises(DataError, match=r"the text has no \[MASK\]"):
        fill_mask(found, "w11 w12")
    with pytest.raises(DataError, match=rf"has {SEQ_LEN + 1} tokens with \[BOS\] and \[EOS\]; at most"):
        fill_mask(found, "[MASK]" * (SEQ_LEN - 1))
    assert len(fill_mask(found, "[MASK]" * (SEQ_LEN - 2))) == SEQ_LEN - 2
    for top in (0, VOCAB + 1):
        with pytest.raises(ConfigError, match=f"top: found {top}; valid: 1 to {VOCAB}"):
            fill_mask(found, "[MASK]", top)


def test_a_model_without_the_component_says_what_it_has() -> None:
    decoder = pretrained(components=frozenset({"decoder"}))
    with pytest.raises(
        CheckpointError, match="has no encoder and no mlm_head, which this needs; found: decoder"
    ):
        fill_mask(decoder, "[MASK]")
    encoder = pretrained(components=frozenset({"encoder", "mlm_head"}))
    with pytest.raises(CheckpointError, match="has no decoder, which this needs; found: encoder, mlm_head"):
        complete(encoder, "w11")
    nameless = Pretrained(decoder.model, None, ALL, None)
    for call in (lambda: complete(nameless, "w11"), lambda: fill_mask(nameless, "[MASK]")):
        with pytest.raises(CheckpointError, match="the model has no tokenizer"):
            call()
    unknown = Pretrained(sample_model(model_config(special_tokens="auto")), words_tokenizer(), ALL, None)
    with pytest.raises(ConfigError, match=r"model.special_tokens: found auto"):
        complete(unknown, "w11")
