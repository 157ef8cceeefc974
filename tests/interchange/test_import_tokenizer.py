"""Published tokenizers: what is missing is added, what is contradictory refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interchange_samples import (
    IDS,
    VOCAB,
    component_tensors,
    edit_json,
    full_tensors,
    model_of,
    published_tokenizer,
    stm_of,
    write_published,
)
from tokenizers import AddedToken, Tokenizer

from rxt_dist.cli import main
from rxt_dist.config.model import SpecialTokens
from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.pretrained import load_pretrained
from rxt_dist.interchange.tokenizer import special_tokens

TEXTS = ["hello world", "é ü 漢字 🙂", "two\nlines\tand  spaces", "a [MASK] in a text"]


def imported(
    folder: Path, tokenizer: Tokenizer | None, *options: str, config: dict[str, Any] | None = None
) -> Any:
    """The native folder of a full model that was published with ``tokenizer``, loaded."""
    model = model_of()
    arguments, tensors = full_tensors(model, stm_of(model.config))
    write_published(folder / "in", arguments | (config or {}), tensors, tokenizer=tokenizer)
    assert main(["import", str(folder / "in"), "--output", str(folder / "out"), *options]) == 0
    return load_pretrained(folder / "out")


def test_text_comes_back(tmp_path: Path) -> None:
    """Published tokenizers have no decoder: without one, spaces and bytes stay symbols."""
    published = published_tokenizer()
    assert published.decode(published.encode("hello world").ids) != " hello world"
    tokenizer = imported(tmp_path, published).tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert IDS["mask"] not in ids
        assert tokenizer.decode(ids) == f" {text}"
    assert tokenizer.get_vocab() == published.get_vocab()


def test_tokens_behind_the_vocabulary_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrappers add [CLS] and [SEP], for which no row of the embedding exists."""
    published = published_tokenizer()
    published.add_special_tokens([AddedToken(name, special=True) for name in ("[CLS]", "[SEP]")])
    assert published.get_vocab_size() == VOCAB + 2
    tokenizer = imported(tmp_path, published).tokenizer
    assert tokenizer.get_vocab_size() == VOCAB
    assert tokenizer.token_to_id("[CLS]") is None
    assert "[CLS], [SEP]" in capsys.readouterr().out


def test_a_larger_vocabulary_is_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of the vocabulary itself are never left out."""
    published = published_tokenizer()
    content = json.loads(published.to_str())
    content["model"]["vocab"]["more"] = VOCAB
    content["added_tokens"].append({**content["added_tokens"][0], "id": VOCAB, "content": "more"})
    model = model_of()
    folder = write_published(tmp_path / "in", *component_tensors(model, "encoder", None))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert main(["import", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "281" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_tokenizer_can_be_given(tmp_path: Path, place: str) -> None:
    file = tmp_path / "elsewhere" / ("tokenizer.json" if place == "folder" else "mine.json")
    file.parent.mkdir()
    published_tokenizer().save(str(file))
    given = file.parent if place == "folder" else file
    loaded = imported(tmp_path, None, "--tokenizer", str(given))
    assert loaded.tokenizer.get_vocab_size() == VOCAB
    assert loaded.model.config.special_tokens.model_dump() == IDS


def test_tokens_can_have_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("[PAD]", "[UNK]", "<s>", "</s>", "[MASK]", "[Q]", "[A]")
    published = published_tokenizer(names=names)
    unnamed = {"tokenizer_config": None}
    with pytest.raises(AssertionError):
        imported(tmp_path / "missing", published, config=unnamed)
    assert "lacks [BOS] [EOS]" in capsys.readouterr().err
    loaded = imported(tmp_path / "given", published, "--tokens", "bos=2", "eos=3", config=unnamed)
    assert loaded.model.config.special_tokens.model_dump() == IDS


def test_given_tokens_decide(tmp_path: Path) -> None:
    tokens = {"tokenizer_config": {"answer_token_id": 9}}
    loaded = imported(tmp_path, published_tokenizer(), "--tokens", "answer=9", config=tokens)
    assert loaded.model.config.special_tokens.answer == 9


def test_without_a_tokenizer_the_configuration_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names five of seven; the others are where published tokenizers have them."""
    loaded = imported(tmp_path, None)
    assert loaded.tokenizer is None
    assert loaded.model.config.special_tokens.model_dump() == IDS
    assert "unk and mask as in published tokenizers" in capsys.readouterr().out


def test_a_component_without_a_tokenizer_knows_no_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_published(tmp_path / "in", *component_tensors(model_of(), "encoder", None))
    assert main(["import", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert load_pretrained(tmp_path / "out").model.config.special_tokens == "auto"
    assert "--tokens" in capsys.readouterr().out
    tokens = [f"{name}={token}" for name, token in IDS.items()]
    assert main(["import", str(folder), "--output", str(tmp_path / "given"), "--tokens", *tokens]) == 0
    assert load_pretrained(tmp_path / "given").model.config.special_tokens == SpecialTokens(**IDS)


CONFIGURED = {"pad": 0, "bos": 2, "eos": 3, "query": 5, "answer": 6}


@pytest.mark.parametrize(
    ("configured", "completed"),
    [
        (CONFIGURED, True),
        (CONFIGURED | {"pad": 9}, False),  # another order
        (CONFIGURED | {"query": 4}, False),  # [MASK] is elsewhere
        ({"pad": 0, "query": 5, "answer": 6}, False),
    ],
    ids=["usual", "order", "taken", "few"],
)
def test_numbers_are_assumed_in_the_usual_order_only(configured: dict[str, int], completed: bool) -> None:
    found = special_tokens({}, None, configured, "folder")
    assert found == (SpecialTokens(**IDS) if completed else None)


def test_what_a_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    tokenizer = published_tokenizer(names=("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[Q]", "[A]"))
    with pytest.raises(CheckpointError, match=r"folder.*\[MASK\].*--tokens mask=ID"):
        special_tokens({}, tokenizer, {}, "folder")


def test_the_tokenizer_of_a_memory_attention_is_not_measured(tmp_path: Path) -> None:
    """It has no vocabulary."""
    model = model_of()
    arguments, tensors = component_tensors(model, "memory_attention", None)
    write_published(tmp_path / "in", arguments, tensors, tokenizer=published_tokenizer())
    edit_json(tmp_path / "in" / "config.json", lambda c: c.pop("vocab_size", None))
    assert main(["import", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.model.config.vocab_size == VOCAB
    assert loaded.tokenizer is not None
