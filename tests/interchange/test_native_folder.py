"""The native folder keeps every bit, says what is wrong with it, and is there completely or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.damage import truncate
from helpers.launch import run_function
from interchange_samples import (
    IDS,
    VOCAB,
    config_of,
    dying_before,
    edit_json,
    model_of,
    published_tokenizer,
    stm_of,
    tensors_equal,
)
from safetensors.torch import load_file, save_file

import rxt_dist
from rxt_dist.errors import CheckpointError
from rxt_dist.interchange.native import COMPONENTS, NativeReader
from rxt_dist.interchange.pretrained import load_pretrained, save_pretrained
from rxt_dist.model import Memory, RxTModel, SequenceLayout, build_model

KILLED = 77


def parameters(model: RxTModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers that hold something."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if not tensor.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "components", [["encoder"], ["decoder"], ["mlm_head"], ["memory_attention"], COMPONENTS], ids="-".join
)
def test_every_bit_comes_back(tmp_path: Path, components: list[str], dtype: torch.dtype) -> None:
    experts = {"num_experts": 3, "top_k": 2, "bias_update_rate": 0.1}
    model = model_of(config_of(memory={"norm": "adaptive"}, decoder={"moe": experts}), dtype)
    stm = stm_of(model.config, dtype)
    save_pretrained(tmp_path / "m", model, tokenizer=None, components=components, stm=stm)
    loaded = load_pretrained(tmp_path / "m", dtype=None)
    assert loaded.components == frozenset(components)
    assert loaded.model.config == model.config
    assert not loaded.model.training
    wanted = {
        name: tensor
        for name, tensor in parameters(model).items()
        if name.partition(".")[0] in components
        or ("decoder" in components and name == "encoder.embedding.weight")
    }
    assert any("ema_rms" in name for name in wanted) == ("memory_attention" in components)
    biases = [tensor for name, tensor in wanted.items() if "selection_bias" in name]
    assert len(biases) == (2 if "decoder" in components else 0)
    assert all(bias.dtype == torch.float32 for bias in biases)
    tensors_equal(parameters(loaded.model), wanted)
    assert loaded.model.decoder.embedding.weight is loaded.model.encoder.embedding.weight
    assert loaded.stm is not None
    tensors_equal({"stm": loaded.stm}, {"stm": stm})


def test_selection_biases_are_exact_in_bf16_and_start_from_zero_where_there_are_none(tmp_path: Path) -> None:
    biased = config_of(decoder={"moe": {"num_experts": 3, "top_k": 2, "bias_update_rate": 0.1}})
    model = model_of(biased)
    save_pretrained(tmp_path / "m", model, tokenizer=None, components=COMPONENTS)
    loaded = load_pretrained(tmp_path / "m", dtype=torch.bfloat16).model
    assert loaded.decoder.lm_head.weight.dtype == torch.bfloat16
    for name, bias in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), bias)
        assert not torch.equal(bias.bfloat16().float(), bias)

    save_pretrained(tmp_path / "plain", model_of(), tokenizer=None, components=COMPONENTS)
    reader, fresh = NativeReader(tmp_path / "plain"), build_model(biased, 1)
    with pytest.raises(CheckpointError, match=r"the folder has no tensor .*\.router\.selection_bias"):
        reader.load_weights(fresh)
    missing = reader.load_weights(fresh, allow_missing=True)
    assert missing == [name for name, _ in fresh.named_buffers()]
    assert not any(bias.any() for bias in fresh.buffers())
    edit_json(
        tmp_path / "plain" / "config.json",
        lambda c: c["model"]["decoder"]["moe"].update(bias_update_rate=0.1),
    )
    assert not any(bias.any() for bias in load_pretrained(tmp_path / "plain").model.buffers())


def test_the_file_has_unfused_tensors_and_the_embedding_once(tmp_path: Path) -> None:
    """Read with the library that everybody else uses, and put together by hand."""
    model = model_of()
    rxt_dist.save_pretrained(tmp_path / "m", model, tokenizer=None, components=COMPONENTS)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    own = parameters(model)
    assert [name for name in stored if "embedding" in name] == ["encoder.embedding.weight"]
    place = "decoder.layers.1"
    for fused, parts in {
        f"{place}.attention.qkv.weight": ["q", "k", "v"],
        f"{place}.cross_attention.kv.weight": ["k", "v"],
    }.items():
        names = [f"{fused.rsplit('.', 2)[0]}.{part}.weight" for part in parts]
        assert torch.equal(torch.cat([stored[name] for name in names]), own[fused])
    elements = sum(tensor.numel() for tensor in stored.values())
    assert elements == sum(parameter.numel() for parameter in model.parameters())
    description = json.loads((tmp_path / "m" / "config.json").read_text())
    assert description["format_version"] == 1
    assert description["components"] == list(COMPONENTS)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}


def test_a_loaded_model_computes_the_same(tmp_path: Path) -> None:
    model = model_of().eval()
    stm = stm_of(model.config)
    rxt_dist.save_pretrained(tmp_path / "m", model, tokenizer=None, components=COMPONENTS, stm=stm)
    loaded = rxt_dist.load_pretrained(tmp_path / "m")
    tokens = torch.randint(0, VOCAB, (11,), generator=torch.Generator().manual_seed(1))
    layout = SequenceLayout.from_lengths([11])
    results = []
    for network in (model, loaded.model):
        with torch.no_grad():
            encoded = network.encoder(tokens, layout)
            memory = network.memory_attention(stm, encoded, layout)
            hidden = network.decoder(tokens, layout, Memory.of_stm(memory, layout)).hidden
            results.append((encoded, memory, hidden, network.mlm_head(encoded[-1])))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_dtype_and_tokenizer(tmp_path: Path) -> None:
    model = model_of(dtype=torch.bfloat16)
    tokenizer = published_tokenizer()
    save_pretrained(
        tmp_path / "m", model, tokenizer=tokenizer, components=["decoder"], stm=stm_of(model.config)
    )
    loaded = load_pretrained(tmp_path / "m")
    assert {tensor.dtype for tensor in parameters(loaded.model).values()} == {torch.float32}
    assert loaded.stm is not None
    assert loaded.stm.dtype == torch.float32
    assert torch.equal(loaded.model.decoder.lm_head.weight, model.decoder.lm_head.weight.float())
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.model.config.special_tokens.model_dump() == IDS  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "m"
    model = model_of()
    stm, tokenizer = stm_of(model.config), published_tokenizer()
    save_pretrained(path, model, tokenizer=tokenizer, components=COMPONENTS, stm=stm)
    return path


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


HEAD = "decoder.lm_head.bias"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ["no config.json"]),
    "no tensors": (lambda p: (p / "model.safetensors").unlink(), ["no model.safetensors"]),
    "broken json": (lambda p: truncate(p / "config.json"), ["config.json", "not valid JSON"]),
    "a list": (lambda p: (p / "config.json").write_text("[1]"), ["config.json", "list"]),
    "truncated": (lambda p: truncate(p / "model.safetensors"), ["model.safetensors", "not a sound"]),
    "truncated header": (lambda p: truncate(p / "model.safetensors", 0.001), ["not a sound"]),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), ["not a sound"]),
    "huge header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64),
        ["model.safetensors", "not a sound"],
    ),
    "version": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(format_version=2)),
        ["format_version", "2", "reads 1"],
    ),
    "fields": (lambda p: edit_json(p / "config.json", lambda c: c.pop("components")), ["components"]),
    "components": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(components=["decodr"])),
        ["components", "decodr", "mlm_head"],
    ),
    "model field": (
        lambda p: edit_json(p / "config.json", lambda c: c["model"].update(width=3)),
        ["config.json", "model.width"],
    ),
    "no vocabulary": (
        lambda p: edit_json(p / "config.json", lambda c: c["model"].update(vocab_size="auto")),
        ["model.vocab_size", "auto"],
    ),
    "missing tensor": (
        lambda p: change_tensors(p, lambda t: t.pop(HEAD)),
        [HEAD, "missing", f"({VOCAB},)"],
    ),
    "extra tensor": (
        lambda p: change_tensors(p, lambda t: t.update({"decoder.more": torch.ones(3, 2)})),
        ["decoder.more", "(3, 2)", "no tensor"],
    ),
    "shape": (
        lambda p: change_tensors(p, lambda t: t.update({HEAD: torch.ones(7)})),
        [HEAD, "(7,)", f"({VOCAB},)"],
    ),
    "tensor type": (
        lambda p: change_tensors(p, lambda t: t.update({HEAD: torch.ones(VOCAB, dtype=torch.int64)})),
        [HEAD, "I64", "F32"],
    ),
    "stm": (
        lambda p: change_tensors(p, lambda t: t.update({"stm": torch.ones(2, 1, 6, 16)})),
        ["stm", "(2, 1, 6, 16)", "(2, 1, 5, 16)"],
    ),
    "tokenizer": (
        lambda p: published_tokenizer(VOCAB - 1).save(str(p / "tokenizer.json")),
        ["tokenizer.json", str(VOCAB - 1), str(VOCAB)],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, tmp_path: Path, name: str) -> None:
    damage, fragments = DAMAGE[name]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(copy)
    message = str(caught.value)
    assert str(copy) in message
    for fragment in fragments:
        assert fragment in message, message
    assert "\n" not in message
    assert len(message) < 400, message


@pytest.mark.parametrize("name", ["nothing", "file", "published"])
def test_other_paths_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "file":
        path.write_text("")
    if name == "published":
        path.mkdir()
        (path / "config.json").write_text('{"embed_dim": 16}')
    with pytest.raises(CheckpointError, match="rxt import" if name == "published" else "not a folder"):
        load_pretrained(path)


def test_what_does_not_fit_is_not_saved(tmp_path: Path) -> None:
    model = model_of()
    for options, message in (
        ({"components": []}, "none"),
        ({"components": ["decoder", "head"]}, "head"),
        ({"components": ["decoder"], "tokenizer": published_tokenizer(279)}, "279"),
        ({"components": ["decoder"], "stm": torch.zeros(2, 3, 5, 16)}, "3, 5, 16"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_pretrained(tmp_path / "m", model, **{"tokenizer": None, **options})  # type: ignore[arg-type]
    nameless = model_of(config_of(special_tokens="auto"))
    with pytest.raises(CheckpointError, match="special_tokens"):
        save_pretrained(tmp_path / "m", nameless, tokenizer=published_tokenizer(), components=["decoder"])
    assert list(tmp_path.iterdir()) == []


def test_a_component_without_weights_is_not_saved(folder: Path, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "d", model_of(), tokenizer=None, components=["decoder"])
    partial = load_pretrained(tmp_path / "d").model
    with pytest.raises(CheckpointError, match="memory_attention has no weights"):
        save_pretrained(tmp_path / "m", partial, tokenizer=None, components=["decoder", "memory_attention"])
    save_pretrained(tmp_path / "again", partial, tokenizer=None, components=["decoder"])
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("d", "again")]
    tensors_equal(*files)


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    save_pretrained(target, model_of(), tokenizer=None, components=["mlm_head"])  # an empty folder is free
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(target, model_of(seed=5), tokenizer=None, components=["mlm_head"])
    assert (target / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        save_pretrained(tmp_path / "file", model_of(), tokenizer=None, components=["mlm_head"])
    with pytest.raises(CheckpointError, match="cannot be made"):
        save_pretrained(tmp_path / "file" / "m", model_of(), tokenizer=None, components=["mlm_head"])


def save_and_die(target: Path, fatal: int) -> None:
    with dying_before(fatal, KILLED):
        save_pretrained(target, model_of(), tokenizer=published_tokenizer(), components=COMPONENTS)


def test_a_crash_leaves_the_folder_complete_or_absent(tmp_path: Path) -> None:
    """The process dies before each change of the file system in turn."""
    target = tmp_path / "m"
    seen = set()
    for fatal in range(40):
        (code,) = run_function(1, save_and_die, target, fatal)
        seen.add(target.exists())
        if target.exists():
            assert load_pretrained(target).components == frozenset(COMPONENTS)
            shutil.rmtree(target)
        if code == 0:
            break
        assert code == KILLED
    assert code == 0
    assert fatal >= 5, "too few operations were seen: is something not caught any more?"
    assert seen == {True, False}
    assert list(tmp_path.iterdir()) == []
