"""Published folders in, the same folders out; and what is in between computes what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange_samples import (
    IDS,
    component_tensors,
    config_of,
    full_tensors,
    model_of,
    published_tokenizer,
    read_published,
    stm_of,
    tensors_equal,
    without_tables,
    write_published,
)
from safetensors.torch import save_file

from rxt_dist.cli import main
from rxt_dist.interchange import load_reference
from rxt_dist.interchange.pretrained import load_pretrained, save_pretrained
from rxt_dist.model import Memory, SequenceLayout

FIXTURES = Path(__file__).parent / "fixtures"
ORACLES = Path(__file__).parent.parent / "parity" / "fixtures"
HUB: dict[str, dict[str, Any]] = torch.load(FIXTURES / "hub_roundtrip.pt", weights_only=True)
FULL = ("encoder", "decoder", "memory_attention")
HALVES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where the channels of a head of width 8 lie when it is stored in halves."""


def rxt(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def random_tensors(name: str) -> dict[str, torch.Tensor]:
    """Tensors of the names and shapes that a published class stores."""
    generator = torch.Generator().manual_seed(3)
    tensors = {key: torch.randn(shape, generator=generator) for key, (shape, _) in HUB[name]["keys"].items()}
    if name == "RxTAlpha":  # saved before sharing: both names are there
        tensors["encoder.model.embedding.weight"] = tensors["decoder.model.embedding.weight"].clone()
        tensors["memory_attention.model.stm.memory"] = tensors["decoder.model.stm.memory"].clone()
    return tensors


@pytest.mark.parametrize("name", HUB)
def test_published_classes_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    """Keys, aliases, bits of every tensor, and the meaning of every argument, of what the classes store."""
    published, tensors = HUB[name], random_tensors(name)
    write_published(tmp_path / "in", published["config"], tensors, published["metadata"])
    rxt("import", tmp_path / "in", "--output", tmp_path / "native")
    rxt("export", tmp_path / "native", "--output", tmp_path / "out")
    full = "decoder_config" in published["config"]
    out = tmp_path / "out" if full else next((tmp_path / "out").iterdir())
    config, stored, metadata = read_published(out)

    if name == "RxTAlpha_shared":  # never stored as aliases again
        shared = {"encoder.model.embedding.weight", "memory_attention.model.stm.memory"}
        aliases = published["metadata"]
        tensors |= {key: tensors[aliases[key]] for key in shared}
        published = HUB["RxTAlpha"]
    assert {key: [list(value.shape), "F32"] for key, value in stored.items()} == {
        key: list(value) for key, value in published["keys"].items()
    }
    tensors_equal(without_tables(stored), without_tables(tensors))
    assert metadata == (published["metadata"] or {})
    prefixes = [f"{part}_config" for part in FULL] if full else [None]
    for prefix in prefixes:
        ours = config if prefix is None else config[prefix]
        theirs = published["config"] if prefix is None else published["config"][prefix]
        for key in ours.keys() & theirs.keys():
            assert ours[key] == theirs[key], key
        if prefix is None:
            cls = name
            kept = dict(tensors)
            assert (
                load_reference(cls, ours, kept).model_config == load_reference(cls, theirs, kept).model_config
            )
    if full:
        for key in ("memory_attention_variant", "tokenizer_config", "tokenizer"):
            assert config[key] == published["config"][key]


@pytest.mark.parametrize("name", ["dec_sqa_asym_4q2kv", "dec_moe_legacy", "dec_moe_shared1", "enc_skipmem"])
def test_real_components_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    """Rotary tables included; and the native folder computes what the published model computed."""
    oracle = torch.load(ORACLES / f"{name}.pt", weights_only=True)
    write_published(tmp_path / "in", oracle["config"], oracle["state_dict"])
    rxt("import", tmp_path / "in", "--output", tmp_path / "native")
    rxt("export", tmp_path / "native", "--output", tmp_path / "out")
    _, expected, aliases = read_published(tmp_path / "in")
    _, stored, metadata = read_published(next((tmp_path / "out").iterdir()))
    tensors_equal(stored, expected)
    assert metadata == aliases

    loaded = load_pretrained(tmp_path / "native")
    ids, mask = oracle["input_ids"], oracle["attention_mask"].bool()
    lengths = mask.sum(1).tolist()
    layout = SequenceLayout.from_lengths(lengths)
    with torch.no_grad():
        if name.startswith("enc"):
            found = loaded.model.encoder(ids[mask], layout)[-1]
            wanted = oracle["last"][mask]
        else:
            hidden = loaded.model.decoder(ids[mask], layout, Memory.of_stm(oracle["stm"], layout)).hidden
            found, wanted = loaded.model.decoder.lm_head(hidden), oracle["logits"][mask]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["mem_self_static_tanh", "mem_grouped2_linear_sig"])
def test_real_memory_attentions_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    oracle = torch.load(ORACLES / f"{name}.pt", weights_only=True)
    write_published(tmp_path / "in", oracle["config"], oracle["state_dict"])
    rxt("import", tmp_path / "in", "--output", tmp_path / "native")
    rxt("export", tmp_path / "native", "--output", tmp_path / "out")
    _, expected, aliases = read_published(tmp_path / "in")
    _, stored, metadata = read_published(tmp_path / "out" / "memory_attention")
    tensors_equal(stored, expected)
    assert metadata == aliases
    loaded = load_pretrained(tmp_path / "native")
    mask, encoded = oracle["attention_mask"].bool(), oracle["ed"]
    layout = SequenceLayout.from_lengths(mask.sum(1).tolist())
    with torch.no_grad():
        found = loaded.model.memory_attention(oracle["stm"], encoded[:, mask], layout)
    assert (found - oracle["new_stm"]).norm() <= 1e-5 * oracle["new_stm"].norm()


MEMORIES: dict[str, dict[str, Any]] = {
    "simple, no gate": {"variant": "simple", "gate": {"type": "off"}},
    "simple, replacing": {"variant": "simple", "gate": {"type": "off"}, "residual": False},
    "self, gated": {"variant": "self", "gate": {"type": "static"}, "gate_self_attention": True},
    "interlayer": {"variant": "interlayer", "gate": {"type": "elementwise"}},
    "self-interlayer, no gate": {"variant": "self_interlayer", "gate": {"type": "off"}},
    "grouped": {"variant": "grouped_self_interlayer", "num_groups": 2, "norm": "adaptive"},
    "grouped, no gate": {"variant": "grouped_self_interlayer", "num_groups": 1, "gate": {"type": "off"}},
    "positional norm": {"variant": "self_interlayer", "norm": "positional", "norm_per_dim_scale": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MEMORIES)
def test_an_export_comes_back_bit_by_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Joined from the component folders, and from the full model."""
    config = config_of(memory=MEMORIES[name])
    model, tokenizer = model_of(config, dtype), published_tokenizer()
    stm = stm_of(config, dtype)
    save_pretrained(tmp_path / "m", model, tokenizer=tokenizer, components=[*FULL, "mlm_head"], stm=stm)
    rxt("export", tmp_path / "m", "--output", tmp_path / "parts", "--components",
        "encoder,decoder,memory_attention,mlm_head")  # fmt: skip
    rxt("import", tmp_path / "parts", "--output", tmp_path / "joined")
    rxt("export", tmp_path / "m", "--output", tmp_path / "all")
    rxt("import", tmp_path / "all", tmp_path / "all" / "mlm_head", "--output", tmp_path / "again")
    before = load_pretrained(tmp_path / "m", dtype=None)
    for folder in ("joined", "again"):
        after = load_pretrained(tmp_path / folder, dtype=None)
        tensors_equal(dict(after.model.state_dict()), dict(before.model.state_dict()))
        assert after.components == before.components
        assert after.stm is not None
        tensors_equal({"stm": after.stm}, {"stm": stm})
        assert after.tokenizer is not None
        assert after.tokenizer.get_vocab() == tokenizer.get_vocab()
        ours, theirs = after.model.config.model_dump(), config.model_dump()
        for dump in (ours, theirs):
            del dump["name"]
            memory = dump["memory_attention"]
            for other in ("interlayer_attention", "self_attention"):
                memory[other] = memory[other] or memory["attention"]
        assert without_training(ours) == without_training(theirs)


def without_training(values: dict[str, Any]) -> dict[str, Any]:
    """A model configuration less what only matters to training, which published folders do not tell."""
    only = {"expert_init", "aux_loss", "aux_loss_scale", "stm_init", "embedding_std", "bias_init"}
    only |= {"interlayer_attention", "self_attention"}
    return {
        key: without_training(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in only
    }


def test_halves_are_converted(tmp_path: Path) -> None:
    """A model written in halves is another file, the same function, and comes back the same."""
    model = model_of(config_of(embed_dim=32)).eval()
    stm = stm_of(model.config)
    save_pretrained(tmp_path / "m", model, tokenizer=None, components=FULL, stm=stm)
    rxt("export", tmp_path / "m", "--output", tmp_path / "h", "--rope-layout", "halves")
    rxt("export", tmp_path / "m", "--output", tmp_path / "i")
    (halves_config, halves, _), (_, interleaved, _) = (read_published(tmp_path / name) for name in "hi")
    moved = {key for key in halves if not torch.equal(halves[key], interleaved[key])}
    assert moved == {
        f"{place}.{layer}.{projection}.weight"
        for layer in ("0", "1")
        for place, projection in (
            ("decoder.model.layers", "memory_cross_attention.k_proj"),
            ("memory_attention.model.attention_layers", "q_proj"),
        )
    }
    key = "decoder.model.layers.0.memory_cross_attention.k_proj.weight"
    assert torch.equal(interleaved[key].view(2, 8, 32), halves[key].view(2, 8, 32)[:, HALVES])
    rxt("import", tmp_path / "h", "--output", tmp_path / "back")
    for part in FULL:
        halves_config[f"{part}_config"].pop("rope_layout", None)
    write_published(tmp_path / "old", halves_config, halves)
    rxt("import", tmp_path / "old", "--output", tmp_path / "said", "--rope-layout", "halves")
    for folder in ("back", "said"):
        after = load_pretrained(tmp_path / folder).model
        tensors_equal(dict(after.decoder.state_dict()), dict(model.decoder.state_dict()))
        tensors_equal(dict(after.memory_attention.state_dict()), dict(model.memory_attention.state_dict()))


def test_a_model_in_halves_is_exported_in_either_layout(tmp_path: Path) -> None:
    config = config_of(rope_layout="halves", embed_dim=32)
    model = model_of(config)
    save_pretrained(tmp_path / "m", model, tokenizer=None, components=["decoder"])
    for layout in ("halves", "interleaved"):
        out = tmp_path / layout
        rxt("export", tmp_path / "m", "--output", out, "--rope-layout", layout)
        arguments, stored, _ = read_published(out / "decoder")
        assert arguments.get("rope_layout", "interleaved") == layout
        reference = load_reference("RxTDecoder", arguments, stored)
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            found = reference.forward_padded(ids)
            stm = reference.stored_stm
            layers = SequenceLayout.from_lengths([6, 6])
            hidden = model.eval().decoder(ids.flatten(), layers, Memory.of_stm(stm, layers)).hidden
        expected = model.decoder.lm_head(hidden).view(2, 6, -1)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_old_class_names(tmp_path: Path) -> None:
    """A decoder of the first releases: halves, no norm of the memory, causal reading, a memory [L, S, D]."""
    config = config_of(decoder={"stm_norm": False, "moe": None}, rope_layout="halves", embed_dim=32)
    model = model_of(config)
    stm = stm_of(config)
    arguments, tensors = component_tensors(model, "decoder", stm)
    del arguments["rope_layout"]
    tensors["model.stm.memory"] = stm[:, 0]
    write_published(tmp_path / "in", arguments, tensors)
    rxt("import", tmp_path / "in", "--class", "rxlm.rxt.models.RxTAlphaDecoder", "--output", tmp_path / "n")
    loaded = load_pretrained(tmp_path / "n")
    assert loaded.model.config.rope_layout == "interleaved"
    assert loaded.model.config.decoder.causal_cross
    assert loaded.stm is not None
    assert torch.equal(loaded.stm, stm)
    kv, old = (network.decoder.layers[0].cross_attention.kv.weight for network in (loaded.model, model))  # type: ignore[union-attr]
    assert torch.equal(kv[:16].view(2, 8, 32), old[:16].view(2, 8, 32)[:, HALVES])
    assert torch.equal(kv[16:], old[16:])


def test_what_looks_old_is_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(decoder={"stm_norm": False})
    arguments, tensors = component_tensors(model_of(config), "decoder", stm_of(config))
    tensors["model.stm.memory"] = tensors["model.stm.memory"][:, 0]
    write_published(tmp_path / "in", arguments, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n")
    printed = capsys.readouterr().out
    assert "[L, S, D]" in printed
    assert "--rope-layout halves" in printed
    assert "RxTAlphaDecoder" in printed


def test_components_of_different_folders_are_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of()
    stm = stm_of(model.config)
    folders = [
        write_published(
            tmp_path / name, *component_tensors(model, name, stm), tokenizer=published_tokenizer()
        )
        for name in (*FULL, "mlm_head")
    ]
    rxt("import", *folders, "--output", tmp_path / "n")
    loaded = load_pretrained(tmp_path / "n")
    tensors_equal(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert loaded.components == {*FULL, "mlm_head"}
    assert loaded.model.config.special_tokens.model_dump() == IDS  # type: ignore[union-attr]
    report = capsys.readouterr().out
    for fragment in (*FULL, "mlm_head", "tokenizer", "byte-level decoder added", "rotary tables ignored"):
        assert fragment in report
    count = sum(p.numel() for p in model.memory_attention.parameters())
    assert f"RxTSelfInterlayerMemoryAttention from {folders[2]}" in report
    assert f"{count} parameters" in report


def test_shorter_sequences_win(tmp_path: Path) -> None:
    folders = []
    for name, length in (("encoder", 24), ("decoder", 20)):
        model = model_of(config_of(seq_len=length))
        folders.append(write_published(tmp_path / name, *component_tensors(model, name, None)))
    rxt("import", *folders, "--output", tmp_path / "n")
    assert load_pretrained(tmp_path / "n").model.config.seq_len == 20


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """Experts in bf16 beside weights in fp32, as published classes make them for a GPU kernel."""
    model = model_of()
    arguments, tensors = component_tensors(model, "decoder", None)
    for name in tensors:
        if name.endswith((".w1", ".w2", ".b1", ".b2")):
            tensors[name] = tensors[name].bfloat16()
    write_published(tmp_path / "in", arguments, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n")
    dtypes = {p.dtype for p in load_pretrained(tmp_path / "n", dtype=None).model.decoder.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}
    rxt("export", tmp_path / "n", "--output", tmp_path / "out")
    stored = read_published(tmp_path / "out" / "decoder")[1]
    stored.pop("model.stm.memory")  # drawn, as none was stored
    tensors_equal(stored, tensors)


@pytest.mark.parametrize("kept", ["encoder", "decoder"])
def test_one_of_two_embeddings_is_kept(tmp_path: Path, kept: str) -> None:
    model = model_of()
    config, tensors = full_tensors(model, stm_of(model.config))
    tensors["encoder.model.embedding.weight"] = tensors["encoder.model.embedding.weight"] + 1
    write_published(tmp_path / "in", config, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n", "--embedding", kept)
    loaded = load_pretrained(tmp_path / "n").model
    assert torch.equal(loaded.decoder.embedding.weight, tensors[f"{kept}.model.embedding.weight"])
    assert loaded.encoder.embedding is loaded.decoder.embedding


def test_a_stored_memory_can_be_left_behind(tmp_path: Path) -> None:
    """Joint training leaves one whose slots are token positions."""
    arguments, tensors = component_tensors(model_of(), "decoder", None)
    tensors["model.stm.memory"] = torch.ones(2, 1, 24, 16)
    write_published(tmp_path / "in", arguments, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n", "--drop-stm")
    assert load_pretrained(tmp_path / "n").stm is None


def test_the_memories_of_a_batch_are_no_initial_memory(tmp_path: Path) -> None:
    """Training leaves them in the file; they are kept for an export, and nothing else."""
    arguments, tensors = component_tensors(model_of(), "decoder", None)
    tensors["model.stm.memory"] = torch.rand(2, 3, 5, 16)
    write_published(tmp_path / "in", arguments, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n")
    assert load_pretrained(tmp_path / "n").stm is None
    rxt("export", tmp_path / "n", "--output", tmp_path / "out")
    tensors_equal(read_published(tmp_path / "out" / "decoder")[1], tensors)


def test_the_memory_of_an_encoder_is_not_read(tmp_path: Path) -> None:
    """Older encoders store one of any size beside cross-attention weights that are dead."""
    sample = config_of()
    parts = sample.encoder.model_dump() | {"memory_cross_attention": {"query_heads": 2, "kv_heads": 1}}
    model = model_of(config_of(encoder=parts))
    arguments, tensors = component_tensors(model, "encoder", None)
    tensors["model.stm.memory"] = torch.ones(2, 1, 99, 16)
    write_published(tmp_path / "in", arguments, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n")
    loaded = load_pretrained(tmp_path / "n")
    assert loaded.stm is None
    tensors_equal(dict(loaded.model.encoder.state_dict()), dict(model.encoder.state_dict()))


def test_a_drawn_memory_is_the_one_that_conversations_start_from(tmp_path: Path) -> None:
    config = config_of(stm_init={"distribution": "uniform", "std": 0.5})
    save_pretrained(tmp_path / "m", model_of(config), tokenizer=None, components=FULL)
    rxt("export", tmp_path / "m", "--output", tmp_path / "out")
    _, stored, _ = read_published(tmp_path / "out")
    memory = stored["decoder.model.stm.memory"]
    assert torch.equal(memory, stored["memory_attention.model.stm.memory"])
    assert memory.shape == (2, 1, 5, 16)
    assert 0 <= memory.min() < 0.1
    assert 0.4 < memory.max() <= 0.5


def test_unknown_keys_are_tolerated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    config, tensors = full_tensors(model, stm_of(model.config))
    config["future"] = 1
    config["decoder_config"]["use_of_tomorrow"] = True
    write_published(tmp_path / "in", config, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n")
    assert "use_of_tomorrow" in caplog.text


@pytest.mark.parametrize("gate", ["linear", "off"])
def test_full_models_call_two_networks_interlayer(tmp_path: Path, gate: str) -> None:
    """The published full model builds the self-interlayer network for both names."""
    model = model_of(config_of(memory={"gate": {"type": gate}}))
    config, tensors = full_tensors(model, stm_of(model.config))
    config["memory_attention_variant"] = "interlayer"
    write_published(tmp_path / "in", config, tensors)
    rxt("import", tmp_path / "in", "--output", tmp_path / "n")
    assert load_pretrained(tmp_path / "n").model.config.memory_attention.variant == "self_interlayer"


def test_a_full_model_that_only_this_program_reads_is_remarked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for variant, remarked in (("simple", True), ("self_interlayer", False)):
        model = model_of(config_of(memory={"variant": variant}))
        save_pretrained(tmp_path / variant, model, tokenizer=None, components=FULL)
        capsys.readouterr()
        rxt("export", tmp_path / variant, "--output", tmp_path / f"{variant}-out")
        assert ("published full model builds no simple" in capsys.readouterr().out) == remarked


def test_the_program_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(tmp_path / "m", model_of(), tokenizer=published_tokenizer(), components=["mlm_head"])
    rxt("export", tmp_path / "m", "--output", tmp_path / "out", "--components", "mlm_head")
    assert f"mlm_head: 6 tensors, {tmp_path / 'out' / 'mlm_head'}" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out" / "mlm_head").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "mlm_head" / "config.json").read_text()) == {
        "embed_dim": 16,
        "vocab_size": 280,
    }


def test_a_class_that_tensors_do_not_show_must_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interlayer networks without gates are stored alike; only our own exports say which it is."""
    model = model_of(config_of(memory={"variant": "interlayer", "gate": {"type": "off"}}))
    save_pretrained(tmp_path / "m", model, tokenizer=None, components=["memory_attention"])
    rxt("export", tmp_path / "m", "--output", tmp_path / "out")
    folder = tmp_path / "out" / "memory_attention"
    _, tensors, metadata = read_published(folder)
    assert metadata["class"] == "RxTInterlayerMemoryAttention"
    del metadata["class"]
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    assert main(["import", str(folder), "--output", str(tmp_path / "n")]) == 2
    assert "--class RxTInterlayerMemoryAttention" in capsys.readouterr().err
    rxt("import", folder, "--output", tmp_path / "n", "--class", "RxTInterlayerMemoryAttention")
    assert load_pretrained(tmp_path / "n").model.config.memory_attention.variant == "interlayer"
