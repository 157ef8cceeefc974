"""What ranks of a training step send, counted, against what `rxt plan` says; and the program itself."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.engines import join_deepspeed
from helpers.launch import python, run_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import meshes, stepping
from benchmarks.mesh_names import MeshName, fitting_meshes, parse_mesh
from benchmarks.mesh_tables import Curves
from benchmarks.meshes import measure_mesh, smaller_micro_batches
from benchmarks.stories import write_stories
from benchmarks.traffic import Traffic, counted_traffic
from benchmarks.workload import read_config
from rxt_dist.config import check_world_size, load_config, micro_units
from rxt_dist.config.mesh import step_units
from rxt_dist.errors import ConfigError, TrainingError
from rxt_dist.parallel.bootstrap import World

JOINT, SFT, MEMORY, SMAT = range(4)  # stages of tiny
# With 3 of 4 experts every token has some at both of two ranks, however it chooses. Of the 2 of 4 in one case
# both may be at the same; there and between four ranks unevenness shows.
SMALL = {
    "model.decoder.moe.top_k": 3,
    "model.seq_len": 16,
    "model.stm_size": 6,
    "model.vocab_size": 64,
    "batch.packs": 8,
    "batch.pack_tokens": 64,
    "batch.lanes": 8,
    "batch.window": 2,
}
ZERO = "deepspeed.zero_optimization"
ALL_CUT = {f"{ZERO}.stage3_param_persistence_threshold": 0}
FROZEN_AHEAD = {
    "stages.3.frozen": "[decoder]",
    "model.decoder.stateless_layers": "[dense, moe]",
    "model.decoder.dense_layer_dim": 64,
}
COPIED_HEADS = {"batch.micro_packs": 1, "model.encoder.attention.kv_heads": 1}
RECOMPUTED = {"runtime.recompute": "interaction", "stages.3.window": 3}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "data": ("dp2", JOINT, {}),
    "experts": ("ep2", JOINT, {"model.decoder.moe.top_k": 2}),
    "tensors, copied heads": ("tp2", JOINT, COPIED_HEADS),
    "both, windows": ("tp2-ep2", SMAT, {"precision": "bf16"}),
    "encodings": ("tp2-ep2", SMAT, {"stages.3.name": "context_sft"}),
    "divided tokens": ("tp2-sp", JOINT, {}),
    "zero 3": ("dp2-zero3", JOINT, ALL_CUT),
    "reduced to one rank": ("dp2", JOINT, {f"{ZERO}.use_multi_rank_bucket_allreduce": False}),
}
"""Mesh, stage and settings."""

SLOW_CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "zero 2, accumulated": ("dp2-zero2", JOINT, {"batch.micro_packs": 2, "precision": "bf16"}),
    "zero 3, windows": ("dp2-zero3", SMAT, ALL_CUT),
    "compiled": ("ep2", JOINT, {"precision": "bf16", "runtime.compile": True}),
    "compiled tensors": ("tp2-sp", JOINT, {"precision": "bf16", "runtime.compile": True}),
    "fp32 sums": ("dp2", JOINT, {"precision": "bf16", "zero.reduce_dtype": "fp32"}),
    "no scatter": ("dp2", JOINT, {f"{ZERO}.reduce_scatter": False}),
    "divided windows": ("tp2-ep2-sp", SMAT, {}),
    "divided encodings": ("tp2-sp", SMAT, {"stages.3.name": "context_sft"}),
    "memory attention": ("tp2", MEMORY, {"runtime.recompute": "interaction"}),
    "sft": ("tp2", SFT, {}),
    "recomputed tensors": ("tp2", SMAT, RECOMPUTED),
    "recomputed experts": ("ep2", SMAT, RECOMPUTED),
    "frozen decoder": ("tp2-ep2", SMAT, FROZEN_AHEAD),
    "frozen encoder": ("tp2", SMAT, {"stages.3.frozen": "[encoder, memory_attention]"}),
}
FOUR_RANKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "all axes": ("dp2-tp2-ep4", SMAT, {"precision": "bf16"}),
    "four tensors": ("tp4-ep2", JOINT, {"batch.micro_packs": 2}),
    "two by two experts": ("dp4-ep2-zero2", JOINT, {"zero.offload_optimizer": "cpu"}),
    "four parts": ("dp4-zero3", SMAT, ALL_CUT),
}
# Relative. Left out are norms and counts; in a window fewer rows have a target than there are tokens; and the
# ranks choose experts unevenly.
TOLERANCE = {
    "gradient_reduction": 1e-3,
    "parameter_all_gather": 1e-3,
    "expert_all_to_all": 0.03,
    "tensor_parallel": 0.03,
}
SCALARS = 64  # bytes, where nothing is planned
Cases = dict[str, tuple[str, int, dict[str, Any]]]


class Witness(TorchDispatchMode):
    """Counts communication where PyTorch dispatches it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def measure(folder: Path, ranks: int, cases: Cases) -> None:
    """On every rank: one case after the other."""
    join_deepspeed()
    rank = dist.get_rank()
    witness = Witness()

    @contextmanager
    def witnessed() -> Iterator[Traffic]:
        with witness, counted_traffic() as traffic:
            yield traffic

    stepping.counted_traffic = witnessed
    # Conversations so long that nearly every interaction has one before it.
    options = Namespace(steps=1, warmup=1, lengths=["16", "16"], interactions=40, folder=folder)
    for name, (mesh_name, stage, own) in cases.items():
        mesh = parse_mesh(mesh_name, ranks)
        overrides = [*(f"{key}={value}" for key, value in (SMALL | own).items()), *mesh.overrides()]
        config, (index,) = read_config("tiny", overrides, stage)
        world = World(rank, rank, ranks, torch.device("cpu"), mesh.tensor_size)
        witness.calls = 0
        found = measure_mesh(config, index, world, options, None)
        found["witnessed"] = witness.calls / stepping.COUNTED_STEPS
        if world.is_main:
            (folder / f"{name}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What was measured in a case; those of a dictionary share a launch."""

    @cache
    def launched(number: int) -> Path:
        ranks, cases = LAUNCHES[number]
        folder = tmp_path_factory.mktemp("meshes")
        assert run_function(ranks, measure, folder, ranks, cases) == [0] * ranks
        return folder

    def found(name: str) -> dict[str, Any]:
        number = next(number for number, (_, cases) in enumerate(LAUNCHES) if name in cases)
        result: dict[str, Any] = json.loads((launched(number) / f"{name}.json").read_text())
        return result

    return found


LAUNCHES = [(2, CASES), (2, SLOW_CASES), (4, FOUR_RANKS)]
PARAMETERS = [
    pytest.param(name, marks=[] if cases is CASES else pytest.mark.slow)
    for _, cases in LAUNCHES
    for name in cases
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_sent_is_what_is_planned(measured: Callable[[str], dict[str, Any]], name: str) -> None:
    found = measured(name)
    sent, planned = found["sent_bytes_for"], found["planned_bytes_for"]
    assert sum(sent.values()) == pytest.approx(sum(found["sent_bytes"].values()))
    for purpose, tolerance in TOLERANCE.items():
        expected = pytest.approx(planned[purpose], rel=tolerance, abs=SCALARS)
        assert sent[purpose] == expected, (purpose, planned[purpose] and sent[purpose] / planned[purpose])
    assert sum(found["calls"].values()) == found["witnessed"] > 1


def test_kinds_of_operations(measured: Callable[[str], dict[str, Any]]) -> None:
    kinds = {name: {kind for kind, size in measured(name)["sent_bytes"].items() if size > SCALARS}
             for name in CASES}  # fmt: skip
    assert kinds == {
        "data": {"all-reduce", "all-gather"},
        "experts": {"all-reduce", "all-gather", "all-to-all"},
        "tensors, copied heads": {"all-reduce", "all-gather"},
        "both, windows": {"all-reduce", "all-gather", "all-to-all"},
        "encodings": {"all-reduce", "all-gather", "all-to-all"},
        "divided tokens": {"all-reduce", "all-gather", "reduce-scatter"},
        "zero 3": {"reduce-scatter", "all-gather"},
        "reduced to one rank": {"reduce", "all-gather"},
    }


def test_names_of_meshes() -> None:
    mesh = parse_mesh("dp2-tp2-ep4-zero2", 8)
    assert (mesh.ranks, mesh.tensor_size, mesh.expert_size, mesh.zero) == (4, 2, 4, 2)
    assert parse_mesh("tp2-sp", 2).divides_tokens
    assert not mesh.divides_tokens
    assert (parse_mesh("tp2", 8).ranks, parse_mesh("dp1", 8).ranks, parse_mesh("ep8", 8).ranks) == (8, 1, 8)
    for name in ("", "tp", "dp0", "pp2", "tp2-tp2", "dp2_tp2", "dp2-", "sp2", "sp-sp"):
        with pytest.raises(ConfigError, match=rf"--meshes: found {name}; valid: dpN"):
            parse_mesh(name, 8)
    with pytest.raises(ConfigError, match=r"dp4-tp4 has 16 ranks; valid: at most --ranks \(8\)"):
        parse_mesh("dp4-tp4", 8)


def test_all_meshes_that_a_run_fits() -> None:
    def names(*overrides: str, ranks: int = 4) -> list[str]:
        return [mesh.name for mesh in fitting_meshes("tiny", overrides, ranks)]

    assert names() == ["dp4", "dp4-ep2", "dp4-ep4", "dp2-tp2", "dp2-tp2-ep2", "dp2-tp2-ep4", "tp4", "tp4-ep2",
                       "tp4-ep4"]  # fmt: skip
    assert names("model.decoder.moe=null", "batch.packs=2", "batch.lanes=2") == ["dp2-tp2", "tp4"]
    assert names(ranks=1) == ["dp1"]
    with pytest.raises(ConfigError, match=r"mesh dp3: world size: found 3 ranks"):
        names("model.decoder.moe=null", ranks=3)


def test_what_cannot_be_compiled_is_not() -> None:
    asked = ["runtime.compile=true", "precision=bf16"]
    for name, compiled in {
        "dp2": True,
        "ep2-zero2": True,
        "tp2": True,
        "tp2-sp": True,
        "dp2-zero3": False,
    }.items():
        mesh = parse_mesh(name, 2)
        mesh.check("tiny", asked)
        config = load_config("tiny", [*asked, *mesh.overrides()], require_data=False)
        assert config.runtime.compile is compiled, name


def test_curves_may_differ_by_three_times_the_control() -> None:
    first = {"curve": [4.0, 2.0], "control": [4.0, 2.02]}  # 0.5 % on average
    near, far = {"curve": [4.0, 1.944]}, {"curve": [3.938, 2.031]}
    near_enough = Curves({"dp2": first, "tp2": near}, rounding=1e-3)
    assert near_enough.bound == pytest.approx(0.015)
    assert near_enough.agree()
    assert not Curves({"dp2": first, "tp2": near, "ep2": far}, rounding=1e-3).agree()
    assert not Curves({"dp2": first | {"control": None}, "tp2": near}, rounding=1e-3).agree()
    assert Curves({"dp2": first | {"control": None}, "tp2": near}, rounding=0.015).agree()
    assert re.search(r"tp2 +4\.00000 +1\.94400  1\.4e-02, 2\.8e-02 \(step 2\)", near_enough.text())
    assert re.search(r"sums regrouped .* 5\.0e-03, 1\.0e-02 \(step 2\)", near_enough.text())


def test_stories_need_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: found 20; valid with --loss-curves: \d\d+ or"):
        write_stories(tmp_path, 20)


@pytest.mark.slow
def test_the_program_compares_meshes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "found.json"
    result = python(
        *("benchmarks/meshes.py", "--ranks", "2", "--meshes", "dp1", "tp2", "--steps", "2", "--warmup", "1"),
        *("--loss-curves", "6", "--json", str(file), "--folder", str(tmp_path / "data")),
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) < 4000
    found = json.loads(file.read_text())
    assert [(name, one["ranks"], one["parallel"]["tensor_size"]) for name, one in found.items()] == [
        ("dp1", 1, 1), ("tp2", 2, 2),
    ]  # fmt: skip
    alone, shared = found.values()
    assert alone["tokens_per_step"] == shared["tokens_per_step"] == 8 * 256
    assert sum(alone["sent_bytes"].values()) == 0 < sum(shared["sent_bytes"].values())
    assert shared["curve"] == pytest.approx(alone["curve"], rel=1e-5)
    assert alone["control"] == pytest.approx(alone["curve"], rel=1e-5)
    assert alone["curve"][-1] < alone["curve"][0] - 0.5
    for name, one in found.items():
        assert re.search(rf"^{name} +1 +no +{one['tokens_per_second']:,.0f} ", result.stdout, re.MULTILINE)
        assert min(one["peak_bytes"], one["planned_bytes"]) > 1e6
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--meshes", "tp3"], r"mesh tp3: parallel\.tensor_size: found 3"),
        (["--meshes", "dp2", "x2"], r"--meshes: found x2; valid: dpN, tpN, epN, zeroN, sp, joined by -"),
        (["--meshes", "tp2-zero3"], r"mesh tp2-zero3: .*zero\.stage: found 3"),
        (["--ranks", "0"], r"--ranks, --steps and --interactions must be 1 or more"),
        (["--loss-curves", "-1"], r"--loss-curves must be 0 or more"),
        (["--lengths", "4", "9"], r"--lengths: found '4'"),
        (["--loss-curves", "3", "--set", "model.vocab_size=20"], r"valid with --loss-curves"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    result = python("benchmarks/meshes.py", "--ranks", "4", *arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_what_a_failed_rank_said_is_shown() -> None:
    overrides = ("--set", "optimizer.lr=1e30", "--set", "optimizer.warmup_steps=0", "--steps", "2")
    result = python("benchmarks/meshes.py", "--ranks", "1", "--meshes", "dp1", *overrides, timeout=300)
    assert result.returncode == 1
    assert "mesh dp1: a rank ended with code 1" in result.stderr
    assert "the loss is not finite" in result.stderr


def test_a_mesh_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, bool]] = []

    def launch(mesh: MeshName, folder: Path, argv: Sequence[str]) -> dict[str, Any]:
        asked.append((mesh.name, "--control" in argv))
        if mesh.name == "dp2":
            raise TrainingError("mesh dp2: a rank ended with code 1")
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(meshes, "launch", launch)
    names = [parse_mesh(name, 2) for name in ("dp2", "tp2", "ep2")]
    found, failed = meshes.measure_all(names, tmp_path, [], tmp_path / "found.json")
    assert failed
    assert list(found) == ["tp2", "ep2"]
    # The first that works is the one that others are compared with.
    assert asked == [("dp2", True), ("tp2", True), ("ep2", False)]
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert "mesh dp2: a rank ended" in capsys.readouterr().err


def test_smaller_micro_batches_leave_the_step_as_it_is() -> None:
    def micro(stage: int, ranks: int, *overrides: str) -> int | None:
        config, _ = read_config("tiny", overrides, stage)
        world = World(0, 0, ranks, torch.device("cpu"))
        smaller = smaller_micro_batches(config, stage, world)
        if smaller is None:
            return None
        check_world_size(smaller, ranks)
        stage_config = smaller.stages[stage]
        assert step_units(smaller, stage_config).total == step_units(config, stage_config).total
        return micro_units(smaller, stage_config, ranks)

    assert [micro(JOINT, ranks) for ranks in (1, 2, 4, 8)] == [4, 2, 1, None]
    assert micro(SMAT, 2) == 4
    assert micro(JOINT, 1, "batch.packs=10", "batch.micro_packs=5") == 1
