from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.launch import free_port, python, shell
from torch.autograd import DeviceType

from benchmarks.profiling import gpu_profile, table, union_seconds
from benchmarks.reference_figures import FIGURES, comparable, comparison
from benchmarks.workload import IDS, SHORTEST
from rxt_dist.config import RunConfig, StageConfig, load_config, resolve_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ["joint_lm", "interaction_sft", "memory_attention", "smat"]
SMALL = ("--config", "tiny", "--set", "batch.micro_packs=2", "--set", "batch.micro_lanes=8")
H100 = "NVIDIA H100 80GB HBM3"


def train_step(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("benchmarks/train_step.py", "--folder", str(folder), *arguments)


def rows_of(output: str, *names: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if line.startswith(names)]


def test_every_stage_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    result = train_step(
        tmp_path / "data",
        *(*SMALL, "--steps", "3", "--warmup", "1", "--lengths", "16", "64"),
        *("--json", str(tmp_path / "found.json")),
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(result.stdout, *STAGES)
    assert [row[0] for row in rows] == STAGES
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["stage"] for one in found["results"]] == STAGES
    assert (found["model"], found["batch"]["micro_packs"]) == ("rxt-tiny", 2)
    for (_, *cells), one in zip(rows, found["results"], strict=True):
        tokens, rate, step, _, forward, backward, update, _, wait = (
            float(cell.replace(",", "")) for cell in cells[:9]
        )
        assert rate == pytest.approx(tokens / (step / 1e3), rel=0.01)
        assert min(forward, backward, update) > 0
        assert 0 <= wait < step
        # No GPU has worked, and a CPU has no rated speed.
        assert cells[9:11] == ["-", "-"]
        assert float(cells[11]) > 50
        assert len(one["all_step_seconds"]) == len(one["losses"]) == 3
        assert sorted(one["all_step_seconds"])[1] == one["step_seconds"]
        assert one["flops_per_token"] > 2 * 64 * 64
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.slow
def test_the_step_without_deepspeed_is_the_same_step(tmp_path: Path) -> None:
    """Clipped, with decay, accumulated over two micro-batches, and with a component that joins later."""
    settings = (
        *("--set", "stages.3.unfreeze={decoder: 4}", "--set", "optimizer.clip_norm=0.1"),
        *("--set", "optimizer.weight_decay=0.5", "--set", "optimizer.lr=0.01"),
        *("--warmup", "1", "--steps", "6", "--without-deepspeed"),
    )
    for stage in ("0", "3"):
        file = tmp_path / f"{stage}.json"
        result = train_step(tmp_path, *SMALL, *settings, "--stage", stage, "--json", str(file))
        assert result.returncode == 0, result.stderr
        assert re.search(r"DeepSpeed adds -?\d+\.\d% to the step", result.stdout)
        with_it, without = json.loads(file.read_text())["results"]
        assert (with_it["engine"], without["engine"]) == ("deepspeed", "plain")
        assert with_it["losses"] == pytest.approx(without["losses"], rel=1e-5)
        assert with_it["losses"][-1] < with_it["losses"][0]
        assert with_it["flops_per_token"] == without["flops_per_token"]


@pytest.mark.slow
def test_in_bf16_on_two_ranks_both_engines_agree(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    settings = ("--set", "precision=bf16", "--without-deepspeed", "--stage", "0", "--steps", "6")
    written = ("--json", str(file), "--profile", "--trace", str(tmp_path / "ran.trace"))
    program = [str(REPOSITORY / "benchmarks" / "train_step.py"), *SMALL, *settings, *written]
    shell([*launcher, "--master_port", str(free_port()), *program], tmp_path, 240).check()
    found = json.loads(file.read_text())
    with_it, without = found["results"]
    assert (found["ranks"], found["precision"]) == (2, "bf16")
    assert with_it["losses"] == pytest.approx(without["losses"], rel=1e-3)
    assert without["losses"][-1] < without["losses"][0]
    ranks = [json.loads((tmp_path / name).read_text()) for name in ("ran.trace", "ran.rank1.trace")]
    assert [trace["distributedInfo"]["rank"] for trace in ranks] == [0, 1]


def test_lengths_are_drawn_from_a_file(tmp_path: Path) -> None:
    lengths, file, trace = (tmp_path / name for name in ("lengths.txt", "found.json", "trace.json"))
    lengths.write_text("32\n32\n64\n")
    short = ("--config", "tiny", "--stage", "0", "--steps", "2", "--warmup", "0", "--profile")
    written = ("--json", str(file), "--trace", str(trace))
    result = train_step(tmp_path, *short, "--lengths", str(lengths), *written)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(file.read_text())["results"]
    tokens = 2 * found["tokens_per_step"]
    assert tokens % 32 == 0
    assert 2 * 8 * (256 - 64) < tokens <= 2 * 8 * 256
    operators = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert any(event["name"] == "aten::mm" for event in json.loads(trace.read_text())["traceEvents"])
    assert operators["aten::mm"]["calls"] > 20
    shown = rows_of(result.stdout, "  ")
    assert any(cells[-1] == "aten::mm" and cells[1].endswith("%") for cells in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "4"], r"--stage: found 4; valid: 0 to 3"),
        (["--set", "model.vocab_size=9"], r"model.vocab_size: found 9; valid here: 12 or more"),
        (["--lengths", "4", "9"], rf"--lengths: found '4'; valid: whole numbers of {SHORTEST} or more"),
        (["--lengths", "12", "9"], r"--lengths: found 12 9"),
        (["--lengths", "12", "19", "20"], r"--lengths: found 3 values"),
        (["--lengths", "missing.txt"], r"--lengths missing.txt: cannot be read"),
        (["--lengths", "LICENSE"], r"--lengths LICENSE: found 'Apache'"),
        (
            ["--without-deepspeed", "--set", "parallel.expert_size=2"],
            r"found parallel.expert_size 2; valid: 1",
        ),
        (["--steps", "0"], r"must be 1 or more"),
        (["--trace", "trace.json", "--stage", "0"], r"--trace needs --profile and --stage"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = train_step(tmp_path, *arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


def test_union_of_intervals() -> None:
    assert union_seconds([]) == 0
    assert union_seconds([(5, 7), (0, 2), (1, 3), (1, 2), (3, 4)]) == 6


def test_gpu_profile_counts_what_overlaps_once() -> None:
    def event(name: str, start: float, end: float, device: DeviceType, note: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=note)

    gpu = DeviceType.CUDA
    found = gpu_profile(
        [
            event("gemm", 0, 3e6, gpu),
            event("copy", 2e6, 4e6, gpu),
            event("gemm", 10e6, 12e6, gpu),
            event("aten::mm", 0, 50e6, DeviceType.CPU),
            event("step", 0, 60e6, gpu, note=True),
        ],
        count=2,
    )
    assert [(k.name, k.calls, k.seconds) for k in found.kernels] == [("gemm", 1, 2.5), ("copy", 0.5, 1)]
    assert found.busy == 3
    text = table(found, step_seconds=5.0)
    assert re.search(r"2500\.000 +50\.0% +1\.0 +gemm", text)
    assert text.endswith("GPU busy 3000.00 of 5000.00 ms a step (60.0%)")


def test_gpu_profile_tells_messages_that_overlap_from_those_that_do_not() -> None:
    def event(name: str, start: float, end: float) -> Any:
        span = SimpleNamespace(start=start * 1e6, end=end * 1e6)
        return SimpleNamespace(name=name, time_range=span, device_type=DeviceType.CUDA)

    sums = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
    events = [
        event("gemm", 0, 6),
        event(sums, 2, 5),
        event(sums, 4, 8),
        event("gemm", 7, 8),
        event(sums, 9, 10),
    ]
    found = gpu_profile(events, count=2)
    assert (found.busy, found.messages, found.exposed) == (4.5, 3.5, 1.0)
    assert "messages take 3500.00 ms of it, 1000.00 ms of them while nothing else runs" in table(found, 5.0)


def resolved(config: str, *overrides: str) -> RunConfig:
    run = load_config(config, overrides, require_data=False)
    size = run.model.card_vocab_size if run.model.vocab_size == "auto" else run.model.vocab_size
    assert isinstance(size, int)
    return resolve_dataset(run, vocab_size=size, special_ids=IDS, tokenizer_sha256={})


def with_stage(config: str, *overrides: str) -> tuple[RunConfig, StageConfig]:
    run = resolved(config, *overrides)
    return run, run.stages[0]


def test_figures_are_compared_with_equal_shapes_only() -> None:
    alpha = resolved("alpha")
    joint, sft, _, smat = alpha.stages
    found = comparable(alpha, joint, [256], H100, 1)
    assert [figure.batch for figure in found] == [64, 128, 192]
    assert comparable(alpha, smat, [256], H100, 1)[-1].tokens_per_second == 117_100
    assert comparable(alpha, sft, [256], H100, 1) == []
    assert comparable(alpha, joint, [255, 256], H100, 1) == []
    assert comparable(alpha, joint, [256], "NVIDIA H200", 1) == []
    assert comparable(alpha, joint, [256], H100, 2) == []
    assert comparable(resolved("alpha", "precision=fp32"), joint, [256], H100, 1) == []
    assert comparable(resolved("alpha", "model.vocab_size=8000"), joint, [256], H100, 1) == []
    dense = resolved("alpha", "model.decoder.moe=null", "model.decoder.ff_dim=2304")
    assert comparable(dense, joint, [256], H100, 1) == []
    assert comparable(resolved("alpha", "batch.window=2"), smat, [256], H100, 1) == []
    assert comparable(*with_stage("micro", "model.vocab_size=7500"), [256], H100, 1) == []  # a shared expert
    micro = resolved("micro", "model=micro", "model.vocab_size=7500")
    assert comparable(micro, micro.stages[0], [256], H100, 1)[-1].compiled
    lines = comparison(found, tokens=128 * 256, tokens_per_second=333_000)
    assert lines == [
        "2.00 x the 166,500 tokens/s of rxlm 0.3.92 at its batch (128)",
        "1.85 x the 179,900 tokens/s of rxlm 0.3.92 at its best batch (192)",
    ]
    assert comparison([], 1.0, 1.0) == []


def test_the_log_has_the_figures() -> None:
    text = (REPOSITORY / "docs" / "performance-log.md").read_text()
    for figure in FIGURES:
        row = rf"\| {figure.model} \| {figure.stage} \| {figure.batch}{', compiled' * figure.compiled} \| "
        assert re.search(rf"{row}{figure.tokens_per_second:,} \|", text), figure
