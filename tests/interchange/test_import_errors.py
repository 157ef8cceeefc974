"""What is wrong with published folders is said in one line, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import truncate
from helpers.launch import run_function
from interchange_samples import (
    VOCAB,
    component_tensors,
    config_of,
    dying_before,
    edit_json,
    full_tensors,
    model_of,
    published_tokenizer,
    stm_of,
    write_published,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rxt_dist.cli import main
from rxt_dist.interchange.pretrained import load_pretrained, save_pretrained

KILLED = 78
HEAD = "decoder.model.head.bias"
MEMORY = "decoder.model.stm.memory"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full model, the same in component folders, and a native folder of it."""
    folder = tmp_path_factory.mktemp("published")
    model, tokenizer = model_of(), published_tokenizer()
    stm = stm_of(model.config)
    write_published(folder / "full", *full_tensors(model, stm), tokenizer=tokenizer)
    for name in ("encoder", "decoder", "memory_attention", "mlm_head"):
        write_published(folder / name, *component_tensors(model, name, stm))
    save_pretrained(folder / "native", model, tokenizer=tokenizer, components=["encoder", "decoder"])
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must refuse."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = captured.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 450, lines[0]
    return lines[0]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    """Edit the tensors and the metadata of a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        metadata = dict(stream.metadata() or {})
    edit(tensors, metadata)
    save_file(tensors, file, metadata=metadata)


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: change(folder, lambda tensors, _: tensors.update({name: tensor}))


def arguments_of(part: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c[f"{part}_config"].update(values))


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "broken config": (lambda f: truncate(f / "config.json"), ["config.json", "not valid JSON"]),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
    "truncated": (lambda f: truncate(f / "model.safetensors"), ["model.safetensors", "not a sound"]),
    "alias of nothing": (
        lambda f: change(f, lambda _, meta: meta.update({"encoder.model.more": "encoder.model.lost"})),
        ["encoder.model.more", "alias", "encoder.model.lost"],
    ),
    "missing tensor": (
        lambda f: change(f, lambda t, _: t.pop(HEAD)),
        ["model.head.bias", "(decoder)", "(280,)"],
    ),
    "extra tensor": (put("decoder.model.more", torch.ones(3)), ["model.more", "(decoder)", "(3,)"]),
    "stray tensor": (put("critic.weight", torch.ones(3)), ["critic.weight", "decoder."]),
    "shape": (put(HEAD, torch.ones(7)), ["model.head.bias", "(decoder)", "(7,)", "(280,)"]),
    "integers": (put(HEAD, torch.ones(VOCAB, dtype=torch.int32)), [HEAD, "I32"]),
    "memory of another size": (
        put(MEMORY, torch.ones(2, 1, 24, 16)),
        ["model.stm.memory", "(2, 1, 24, 16)", "(2, 1, 5, 16)", "--drop-stm"],
    ),
    "memory of two dimensions": (put(MEMORY, torch.ones(5, 16)), ["model.stm.memory", "(5, 16)"]),
    "no component config": (
        lambda f: edit_json(f / "config.json", lambda c: c.pop("encoder_config")),
        ["encoder_config", "missing"],
    ),
    "variant": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(memory_attention_variant="none")),
        ["memory_attention_variant", "'none'", "self-interlayer"],
    ),
    "argument": (
        arguments_of("decoder", ff_activation="tanh"),
        ["(decoder)", "ff_activation", "'tanh'", "swish"],
    ),
    "layout": (
        arguments_of("decoder", rope_layout="thirds"),
        ["(decoder)", "rope_layout", "'thirds'", "halves"],
    ),
    "impossible": (arguments_of("decoder", att_heads=5), ["(decoder)", "att_heads", "5"]),
    "vocabularies": (
        lambda f: (
            arguments_of("encoder", vocab_size=9)(f),
            put("encoder.model.embedding.weight", torch.ones(9, 16))(f),
        ),
        ["(encoder)", "(decoder)", "vocab_size", "9", "280"],
    ),
    "rotary bases": (
        arguments_of("memory_attention", rope_base=500),
        ["(encoder)", "(memory_attention)", "rope_base", "500", "10000"],
    ),
    "embeddings": (
        lambda f: change(f, lambda t, _: t["encoder.model.embedding.weight"][0].add_(1)),
        ["(encoder)", "(decoder)", "embedding", "published loader", "--embedding"],
    ),
    "one bit of an embedding": (
        lambda f: change(f, lambda t, _: t["encoder.model.embedding.weight"].view(torch.int32)[5, 3].add_(1)),
        ["embedding"],
    ),
    "tokenizer": (
        lambda f: published_tokenizer(VOCAB - 3).save(str(f / "tokenizer.json")),
        ["tokenizer.json", "277", "280"],
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ["tokenizer.json", "not a tokenizer"],
    ),
    "token numbers": (
        lambda f: edit_json(f / "config.json", lambda c: c["tokenizer_config"].update(answer_token_id=9)),
        ["answer", "9", "6", "[A]", "--tokens answer=ID"],
    ),
    "token number": (
        lambda f: edit_json(f / "config.json", lambda c: c["tokenizer_config"].update(answer_token_id="6")),
        ["tokenizer_config.answer_token_id", "'6'"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_full_model_is_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, fragments = DAMAGE[name]
    folder = tmp_path / "full"
    shutil.copytree(published / "full", folder)
    damage(folder)
    message = refused(capsys, "import", folder, "--output", tmp_path / "out")
    assert str(folder) in message
    for fragment in fragments:
        assert fragment in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_components_that_are_no_model_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both folders are named, with what they disagree on."""
    others = {
        "decoder": (config_of(embed_dim=32), ["embed_dim", "16", "32"]),
        "mlm_head": (config_of(vocab_size=300), ["vocab_size", "280", "300"]),
        "memory_attention": (config_of(stm_size=6), ["stm_size", "5", "6"]),
    }
    layers = config_of().model_dump()
    for part in ("encoder", "decoder"):
        layers[part]["num_layers"] = 3
    others["memory_attention of 3 layers"] = (config_of(**layers), ["num_layers", "2", "3"])
    layer_norm = config_of(norm="layer")
    others["decoder with LayerNorm"] = (layer_norm, ["norm", "rms", "layer"])
    for name, (config, fragments) in others.items():
        component = name.partition(" ")[0]
        folder = write_published(tmp_path / name, *component_tensors(model_of(config), component, None))
        first = published / ("encoder" if component != "memory_attention" else "decoder")
        message = refused(capsys, "import", first, folder, "--output", tmp_path / "out")
        for fragment in (str(first), str(folder), *fragments):
            assert fragment in message, message
    assert not (tmp_path / "out").exists()


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown class": (["decoder", "--class", "GPT2Model"], ["GPT2Model", "RxTDecoder"]),
    "class of another kind": (
        ["decoder", "--class", "RxTEncoder"],
        ["--class RxTEncoder", "no encoder", "decoder"],
    ),
    "wrong class": (
        ["memory_attention", "--class", "RxTSelfMemoryAttention"],
        ["memory_attention: config: att_query_groups"],
    ),
    "twice": (["decoder", "decoder"], ["both hold a decoder"]),
    "native": (["native"], ["native folder", "needs no import"]),
    "nothing there": (["nowhere"], ["nowhere", "not a folder"]),
    "a file": (["full/config.json"], ["config.json", "not a folder"]),
    "token name": (["full", "--tokens", "bot=3"], ["--tokens bot=3", "answer"]),
    "token number": (["full", "--tokens", "bos=x"], ["--tokens bos=x"]),
    "tokens twice": (["full", "--tokens", "bos=2", "bos=3"], ["bos=3", "2"]),
    "same tokens": (["full", "--tokens", "bos=3"], ["special_tokens", "id of its own"]),
    "token outside": (["full", "--tokens", "bos=280"], ["special_tokens.bos", "280", "279"]),
    "no such tokenizer": (["full", "--tokenizer", "nowhere.json"], ["nowhere.json"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_arguments_are_refused(
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, fragments = OPTIONS[name]
    monkeypatch.chdir(published)
    message = refused(capsys, "import", *arguments, "--output", tmp_path / "out")
    for fragment in fragments:
        assert fragment in message, message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_published(tmp_path / "in", {"hidden_size": 4}, {"transformer.wte.weight": torch.ones(3, 4)})
    message = refused(capsys, "import", tmp_path / "in", "--output", tmp_path / "out")
    assert "no component is known" in message
    assert "transformer.wte.weight" in message


def test_two_tokenizers_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, size in (("encoder", VOCAB), ("decoder", VOCAB)):
        folders.append(tmp_path / name)
        shutil.copytree(published / name, folders[-1])
        tokenizer = published_tokenizer(size)
        content = json.loads(tokenizer.to_str())
        if name == "decoder":
            vocabulary = content["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folders[-1] / "tokenizer.json").write_text(json.dumps(content))
    message = refused(capsys, "import", *folders, "--output", tmp_path / "out")
    for folder in folders:
        assert str(folder / "tokenizer.json") in message
    assert "--tokenizer" in message
    code = main(
        ["import", *map(str, folders), "--output", str(tmp_path / "out"), "--tokenizer", str(folders[0])]
    )
    assert code == 0


def test_nothing_is_overwritten(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, source in (("import", "full"), ("export", "native")):
        target = tmp_path / command
        target.mkdir()
        (target / "precious").write_text("1")
        message = refused(capsys, command, published / source, "--output", target)
        assert str(target) in message
        assert "not empty" in message
        assert [path.name for path in target.iterdir()] == ["precious"]


def test_exports_that_cannot_be_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for components, fragments in (
        ("everything", ["'everything'", "mlm_head"]),
        ("encoder,", ["''"]),
        ("full", [str(published / "native"), "has no memory_attention", "encoder, decoder"]),
        ("decoder,mlm_head", ["has no mlm_head"]),
    ):
        message = refused(capsys, "export", published / "native", "--output", out, "--components", components)
        for fragment in fragments:
            assert fragment in message, message
    assert "rxt import" in refused(capsys, "export", published / "full", "--output", out)
    own = {"query_heads": 2, "kv_heads": 2, "qk_norm": True}
    gateless = {"variant": "interlayer", "gate": {"type": "off"}}
    models = {
        "qk_norm": (config_of(decoder={"attention": own}), "decoder", ["decoder.attention.qk_norm"]),
        "interlayer": (config_of(memory=gateless), "full", ["interlayer", "gates"]),
    }
    for name, (config, components, fragments) in models.items():
        whole = ("encoder", "decoder", "memory_attention")
        save_pretrained(tmp_path / name, model_of(config), tokenizer=None, components=whole)
        message = refused(capsys, "export", tmp_path / name, "--output", out, "--components", components)
        for fragment in fragments:
            assert fragment in message, message
    assert not out.exists()


def import_and_die(source: Path, target: Path, fatal: int) -> None:
    with dying_before(fatal, KILLED):
        assert main(["import", str(source), "--output", str(target)]) == 0


def test_a_killed_import_leaves_no_folder_of_that_name(published: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    seen = set()
    for fatal in range(40):
        (code,) = run_function(1, import_and_die, published / "full", target, fatal)
        seen.add(target.exists())
        if target.exists():
            load_pretrained(target)
            shutil.rmtree(target)
        if code == 0:
            break
        assert code == KILLED
    assert code == 0
    assert seen == {True, False}
    assert list(tmp_path.iterdir()) == []
