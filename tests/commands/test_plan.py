"""`rxt plan --model`: the published figures, through the command as a script would read it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launch import python

from rxt_dist.cli import main
from rxt_dist.config import CONFIG_FOLDER, available, load_model_config
from rxt_dist.model import build_model

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = [
    "vocab_size", "total", "unique", "active", "encoder", "decoder", "decoder_active", "memory_attention",
    "mlm_head", "embedding",
]  # fmt: skip
PUBLISHED = {
    "micro": {"decoder": 8_766_088, "encoder": 1_878_016, "vocab_size": 5000},
    "micro-plus": {"decoder": 22_403_660, "mlm_head": 984_268, "vocab_size": 7500},
    "mini": {
        "decoder": 57_765_648,
        "encoder": 9_138_176,
        "mlm_head": 2_636_304,
        "vocab_size": 10_000,
    },
    "alpha": {
        "total": 160_710_432,
        "unique": 155_590_432,
        "decoder": 141_379_104,
        "decoder_active": 34_842_144,
        "encoder": 13_801_472,
        "memory_attention": 5_529_856,
        "vocab_size": 20_000,
        "embedding": 5_120_000,
    },
    "beta": {
        "total": 2_961_229_312,
        "decoder": 2_841_937_920,
        "decoder_active": 194_807_808,
        "encoder": 96_958_976,
        "mlm_head": 33_883_648,
        "vocab_size": 65_536,
    },
}


def fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter without a GPU, its output piped."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def parsed(text: str) -> dict[str, int]:
    """Every line must be ``name: N`` with plain digits."""
    lines = [re.fullmatch(r"([a-z_]+): ([0-9]+)", line) for line in text.splitlines()]
    assert all(lines), text
    return {line[1]: int(line[2]) for line in lines if line is not None}


def counts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, int]:
    assert main(["plan", *arguments]) == 0
    return parsed(capsys.readouterr().out)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_figures_are_printed_one_a_line_also_when_piped(model: str) -> None:
    result = python("-m", "rxt_dist.cli", "plan", "--model", model)
    assert (result.returncode, result.stderr) == (0, "")
    found = parsed(result.stdout)
    assert list(found) == NAMES
    assert {name: found[name] for name in PUBLISHED[model]} == PUBLISHED[model]


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    plain = counts(capsys, "--model", "alpha")
    assert main(["plan", "--model", "alpha", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plain


def test_counting_starts_no_engine_and_makes_no_tensor() -> None:
    """What would cost seconds and gigabytes: 2.9 billion fp32 numbers are 12 GB."""
    limited = """
import resource, sys, torch, rxt_dist.model
from rxt_dist.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (2 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert main(["plan", "--model", "beta"]) == 0
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
slow = {"deepspeed", "megatron", "torch._dynamo", "rxt_dist.train", "rxt_dist.data"}
print(sorted(slow & set(sys.modules)))
"""
    result = fresh_python("-c", limited)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("size", [41, 400])
def test_the_vocabulary_can_be_given(capsys: pytest.CaptureFixture[str], size: int) -> None:
    found = counts(capsys, "--model", "tiny", "--vocab-size", str(size))
    config = load_model_config("tiny")
    model = build_model(config.model_copy(update={"vocab_size": size}), seed=0)
    built = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert found["vocab_size"] == size
    assert {name: found[name] for name in built} == built
    assert found["embedding"] == size * config.embed_dim
    assert found["unique"] + found["mlm_head"] == sum(p.numel() for p in model.parameters())
    assert found["total"] - found["unique"] == found["embedding"]


def test_a_given_vocabulary_goes_before_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    found = counts(capsys, "--model", "alpha", "--vocab-size", "8000")
    assert found["embedding"] == 8000 * 256
    assert found["decoder"] == 141_379_104 - 12_000 * (2 * 256 + 1)


def test_a_file_with_a_vocabulary_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"extends: {CONFIG_FOLDER / 'models' / 'alpha.yaml'}\nvocab_size: 9000\n")
    assert counts(capsys, "--model", str(file))["vocab_size"] == 9000
    assert counts(capsys, "--model", str(file), "--vocab-size", "50")["vocab_size"] == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], f"model nope: no such file; available models: {', '.join(available('models'))}"),
        (["missing/file.yaml"], "model missing/file.yaml: no such file; available models: alpha"),
        (["configs"], "model configs: no such file"),
        (
            ["tiny"],
            "model tiny: vocab_size is auto and card_vocab_size is not set; give it with --vocab-size",
        ),
        (
            ["alpha", "--vocab-size", "7"],
            "--vocab-size 7: vocab_size: found 7; must be greater than or equal",
        ),
        (["alpha", "--vocab-size", "-1"], "--vocab-size -1: vocab_size: found -1"),
    ],
)
def test_mistakes_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", "--model", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message in output.err
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing; the file must be a mapping"),
        ("name: [", "line 1"),
        ("extends: alpha\nlayers: 3\n", "layers: unknown key"),
        ("extends: alpha\ndecoder: {num_layers: 3}\n", "decoder.num_layers: found 3; must equal"),
        ("extends: alpha\nembed_dim: 24\n", "encoder.heads: found 16"),
    ],
)  # fmt: skip
def test_a_broken_file_is_the_configurations_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert main(["plan", "--model", str(file)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {file}")
    assert message in output.err


def test_a_vocabulary_too_small_for_the_files_special_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    tokens = "{pad: 0, unk: 1, bos: 2, eos: 3, mask: 4, query: 5, answer: 60}"
    file.write_text(f"extends: tiny\nspecial_tokens: {tokens}\n")
    assert main(["plan", "--model", str(file), "--vocab-size", "60"]) == 2
    assert "special_tokens.answer: found 60; must be below vocab_size" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--model"], ["--model", "alpha", "--vocab-size", "many"]])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2
    assert "rxt plan: error" in capsys.readouterr().err
