"""--init-from a native folder: its weights, bit by bit, and nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import naive
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, checkpoints, metrics, relative, tensors
from interchange_samples import (
    VOCAB,
    component_tensors,
    model_of,
    published_tokenizer,
    tensors_equal,
    write_published,
)

from data_prep.cli import main as rxt_data
from rxt_dist.cli import main
from rxt_dist.config import ModelConfig, load_config, load_model_config
from rxt_dist.data.manifest import load_manifest
from rxt_dist.data.tokens import load_tokenizer
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.interchange.pretrained import save_pretrained
from rxt_dist.model import RxTModel, build_model
from rxt_dist.model.canonical import canonical_parts
from rxt_dist.train.datasets import open_datasets, resolve
from rxt_dist.train.initial_weights import check_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# The encoder alone is trained: what became of the rest shows in the first checkpoint.
SETTINGS: dict[str, Any] = SMALL | {
    "stages": "[{name: joint_lm, steps: 1, components: encoder}]",
    "optimizer.warmup_steps": 0,
    "seed": 9,
}


@pytest.fixture(scope="module")
def config(datasets: Datasets) -> ModelConfig:
    """The model of a run of ``tiny`` on ``datasets``."""
    overrides = [f"data.text={datasets.text}", f"data.conversations={datasets.conversations}"]
    run = load_config("tiny", overrides)
    return resolve(run, open_datasets(run)).model


@pytest.fixture(scope="module")
def tokenizer(datasets: Datasets) -> Path:
    return datasets.text / "tokenizer"


def canonical(model: RxTModel) -> dict[str, torch.Tensor]:
    """The parameters of ``model`` as checkpoints name them."""
    named = dict(model.named_parameters())
    return {
        part.name: named[name].detach().view(-1)[part.start : part.start + part.numel].view(part.shape)
        for name, parts in canonical_parts(model).items()
        for part in parts
    }


def save(folder: Path, model: RxTModel, tokenizer: Path, *components: str) -> Path:
    save_pretrained(folder, model, tokenizer=load_tokenizer(tokenizer), components=components)
    return folder


def test_a_run_starts_from_a_folder(
    datasets: Datasets, config: ModelConfig, tokenizer: Path, tmp_path: Path
) -> None:
    """The folder has the encoder and the decoder, in bf16; the two others start as they would without it."""
    model = build_model(config, 77).to(torch.bfloat16)
    folder = save(tmp_path / "folder", model, tokenizer, "encoder", "decoder")
    command = [*arguments(datasets, "run", SETTINGS), "--init-from", str(folder)]
    result = run_ranks(2, command, tmp_path).check()
    run_dir = tmp_path / "run"

    fresh = build_model(config, SETTINGS["seed"])
    expected = canonical(fresh) | {
        name: value.float()
        for name, value in canonical(model).items()
        if name.startswith(("encoder.", "decoder."))
    }
    assert "tensors start fresh (mlm_head" in result.output
    with torch.no_grad():
        for name, value in canonical(fresh).items():
            value.copy_(expected[name])
    run = load_config(run_dir / "config.yaml")
    with naive.whole_steps(run, 0) as batches, torch.no_grad():
        loss = naive.means(fresh, [next(batches)])["mlm_loss"].item()
    assert relative(metrics(run_dir)[0]["mlm_loss"], loss) <= 1e-5

    (checkpoint,) = checkpoints(run_dir).values()
    stored = {name[7:]: value for name, value in tensors(checkpoint).items() if name.startswith("weight.")}
    assert stored.keys() == expected.keys()
    untrained = ("decoder.", "memory_attention.")
    tensors_equal(
        {name: value for name, value in stored.items() if name.startswith(untrained)},
        {name: value for name, value in expected.items() if name.startswith(untrained)},
    )
    assert not torch.equal(stored["encoder.embedding.weight"], expected["encoder.embedding.weight"])


def test_the_model_of_a_folder_is_a_model_file(config: ModelConfig, tokenizer: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", build_model(config, 0), tokenizer, "decoder")
    description = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.yaml").write_text(json.dumps(description["model"]))
    assert load_model_config(tmp_path / "model.yaml") == config


def test_data_is_made_with_the_tokenizer_of_a_published_model(tmp_path: Path) -> None:
    """It has the tokens that training needs, and not those that later models reserve."""
    model = model_of()
    write_published(
        tmp_path / "in", *component_tensors(model, "decoder", None), tokenizer=published_tokenizer()
    )
    assert main(["import", str(tmp_path / "in"), "--output", str(tmp_path / "m")]) == 0
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n' * 40)
    command = ["shard", "text", "--input", str(tmp_path / "texts.jsonl"), "--tokenizer", str(tmp_path / "m")]
    assert rxt_data([*command, "--output", str(tmp_path / "data"), "--workers", "1"]) == 0
    manifest = load_manifest(tmp_path / "data")
    assert manifest.vocab_size == VOCAB
    assert check_weights(tmp_path / "m", model.config, tmp_path / "data" / "tokenizer") == tmp_path / "m"


def test_another_tokenizer_is_refused(config: ModelConfig, tokenizer: Path, tmp_path: Path) -> None:
    """By what the tokens mean, not by the bytes of the file."""
    folder = save(tmp_path / "folder", build_model(config, 0), tokenizer, "encoder")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content))
    assert check_weights(folder, config, tokenizer) == folder
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="another tokenizer") as caught:
        check_weights(folder, config, tokenizer)
    assert str(folder) in str(caught.value)


def test_a_folder_without_tokenizer_is_taken_with_a_warning(
    config: ModelConfig, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pretrained(tmp_path / "m", build_model(config, 0), tokenizer=None, components=["encoder"])
    with caplog.at_level(logging.WARNING):
        check_weights(tmp_path / "m", config, tokenizer)
    assert "tokenizer.json" in caplog.text


def test_a_model_of_another_shape_is_refused(config: ModelConfig, tokenizer: Path, tmp_path: Path) -> None:
    half = config.encoder.model_copy(update={"ff_dim": config.encoder.ff_dim // 2})
    other = config.model_copy(update={"encoder": half})
    folder = save(tmp_path / "m", build_model(other, 0), tokenizer, "encoder", "mlm_head")
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.feed_forward") as caught:
        check_weights(folder, config, tokenizer)
    assert f"({config.encoder.ff_dim}, {config.embed_dim})" in str(caught.value)


def test_another_depth_is_refused(config: ModelConfig, tokenizer: Path, tmp_path: Path) -> None:
    """A folder with more layers than the run would lose some."""
    parts = {
        name: getattr(config, name).model_copy(update={"num_layers": config.encoder.num_layers + 1})
        for name in ("encoder", "decoder")
    }
    folder = save(tmp_path / "m", build_model(config.model_copy(update=parts), 0), tokenizer, "encoder")
    with pytest.raises(CheckpointError, match="expected no tensor"):
        check_weights(folder, config, tokenizer)


def test_settings_that_change_what_weights_compute_are_named(
    config: ModelConfig, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of components that are not in the folder, and of training alone, are not."""
    folder = save(tmp_path / "m", build_model(config, 0), tokenizer, "encoder", "memory_attention")
    with caplog.at_level(logging.WARNING):
        check_weights(folder, config, tokenizer)
    assert caplog.text == ""
    gate = config.memory_attention.gate.model_copy(update={"bias_init": 0.5})
    changed = config.model_copy(
        update={
            "rope_base": 777.0,
            "embedding_std": 0.5,
            "memory_attention": config.memory_attention.model_copy(update={"gate": gate}),
            "encoder": config.encoder.model_copy(update={"activation": "gelu"}),
            "decoder": config.decoder.model_copy(update={"activation": "gelu"}),
        }
    )
    with caplog.at_level(logging.WARNING):
        check_weights(folder, changed, tokenizer)
    named = {record.getMessage().partition(":")[0] for record in caplog.records}
    assert named == {"model.rope_base", "model.encoder.activation"}
    assert "777" in caplog.text


def test_selection_biases_may_be_added_but_not_lost(
    config: ModelConfig, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def with_rate(rate: float | None) -> ModelConfig:
        assert config.decoder.moe is not None
        moe = config.decoder.moe.model_copy(update={"bias_update_rate": rate})
        return config.model_copy(update={"decoder": config.decoder.model_copy(update={"moe": moe})})

    plain = save(tmp_path / "plain", build_model(config, 0), tokenizer, "decoder")
    biased = save(tmp_path / "biased", build_model(with_rate(0.001), 0), tokenizer, "decoder")
    encoder = save(tmp_path / "encoder", build_model(with_rate(0.001), 0), tokenizer, "encoder")
    with caplog.at_level(logging.WARNING):
        check_weights(plain, with_rate(0.001), tokenizer)
        check_weights(biased, with_rate(0.0), tokenizer)
        check_weights(encoder, config, tokenizer)
    assert caplog.text == ""
    with pytest.raises(
        ConfigError, match=r"^model\.decoder\.moe\.bias_update_rate: .*biased .* found null; valid: 0"
    ):
        check_weights(biased, config, tokenizer)


def test_a_damaged_folder_is_refused_before_the_run_folder_exists(
    datasets: Datasets, config: ModelConfig, tokenizer: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "m", build_model(config, 0), tokenizer, "encoder")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    command = [*arguments(datasets, "run", SETTINGS), "--init-from", str(folder)]
    result = run_ranks(1, command, tmp_path, launcher=False)
    assert result.codes == [2]
    messages = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "model.safetensors" in messages[0]
    assert not (tmp_path / "run").exists()
