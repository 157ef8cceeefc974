"""`rxt plan --config`: groups, refusals, and numbers against real engines and by hand."""

from __future__ import annotations

import json
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import join_deepspeed, start_engine, state_bytes
from helpers.lanes import (  # fmt: skip
    SETTINGS,
    MemoryPieces,
    lane_config,
    lane_module,
    random_conversations,
    windows,
)
from helpers.launch import run_function

from rxt_dist.cli import main
from rxt_dist.config import load_config
from rxt_dist.model import build_model
from rxt_dist.parallel.mesh import Mesh
from rxt_dist.parallel.parallelize import parallelize
from rxt_dist.train.plan import plan_run

STAGES = ("{name: joint_lm, steps: 2}", "{name: memory_attention, steps: 2}",
          "{name: smat, steps: 9, frozen: [encoder], unfreeze: {memory_attention: 3}}")  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    (stage, {"zero.stage": zero, "precision": precision})
    for stage, zero, precision in zip(STAGES, (1, 2, 1), ("fp32", "bf16", "bf16"), strict=True)
]
CASES += [(stage, {"parallel.expert_size": 2, "zero.stage": 2}) for stage in STAGES]
CASES += [(stage, {"parallel.tensor_size": 2}) for stage in STAGES]
CASES += [
    (
        STAGES[2],
        {
            "parallel.tensor_size": 2,
            "parallel.expert_size": 2,
            "model.decoder.attention": "{query_heads: 4, kv_heads: 1, gated: true, qk_norm: true}",
            "model.decoder.moe.num_shared_experts": 2,
        },
    )
]
SMALL_ONES = "deepspeed.zero_optimization.stage3_param_persistence_threshold"
CASES += [
    (STAGES[0], {"zero.stage": 3, SMALL_ONES: 0, "zero.offload_optimizer": "cpu"}),
    (STAGES[1], {"zero.stage": 3, SMALL_ONES: 700, "precision": "bf16"}),
    (STAGES[2], {"zero.stage": 3, "deepspeed.zero_optimization.stage3_model_persistence_threshold": 5000}),
    (STAGES[2], {"zero.stage": 2, "zero.offload_optimizer": "cpu", "precision": "bf16"}),
    (STAGES[0], {"zero.offload_optimizer": "cpu", "precision": "bf16"}),
]


def overrides(stage: str, own: dict[str, Any]) -> list[str]:
    values = SETTINGS | {"stages": f"[{stage}]"} | own
    return [f"{key}={value}" for key, value in values.items()]


def measure(folder: Path) -> None:
    """On every rank: what its engines hold, case by case."""
    join_deepspeed()
    found = []
    for stage, own in CASES:
        config = load_config("tiny", overrides(stage, own), require_data=False)
        sizes, rank = config.parallel, torch.distributed.get_rank()
        mesh = Mesh(2, sizes.tensor_size, sizes.expert_size)
        engine = start_engine(
            config, build_model(config.model, 0, partial(parallelize, mesh=mesh, rank=rank))
        )
        found.append(state_bytes(engine))
        engine.close()
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


def plan(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_weights_and_optimizer_state_are_those_of_real_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_function(2, measure, tmp_path) == [0, 0]
    for rank in range(2):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        for (stage, own), found in zip(CASES, measured, strict=True):
            options = [part for one in overrides(stage, own) for part in ("--set", one)]
            (planned,) = plan("--config", "tiny", "--world-size", "2", *options, capsys=capsys)["stages"]
            assert {name: planned["memory_bytes"][name] for name in found} == found, (stage, rank)
            assert found["optimizer"] + found["host_optimizer"] > 0


def test_gradients_lanes_and_communication_by_hand() -> None:
    config = lane_config("{name: smat, steps: 2}", batch__window=3, batch__micro_lanes=1)
    model = build_model(config.model, 0)
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mlm_head"))
    for zero, reductions in ((1, 1), (2, 2)):
        config = lane_config(
            "{name: smat, steps: 2}", batch__window=3, batch__micro_lanes=1, zero__stage=zero,
            zero__reduce_bucket_size=1000,
        )  # fmt: skip
        (stage,) = plan_run(config, 2, 41)["stages"]
        assert stage["micro_batches"] == 2
        assert stage["tokens_per_rank"] == 2 * 3 * config.model.seq_len
        assert stage["memory_bytes"]["lane_stm"] == 2 * 2 * 6 * 64 * 4  # lanes, layers, slots, width, fp32
        assert stage["communication_bytes"]["parameter_all_gather"] == trained * 4 // 2
        # Every rank gets whole sums, of which it needs half.
        assert stage["communication_bytes"]["gradient_reduction"] == reductions * 2 * trained * 4 // 2
        assert stage["communication_bytes"]["expert_all_to_all"] == 0
        wanted = trained * 4 if zero == 1 else (trained + 1) // 2 * 4 + 1000 * 4
        assert abs(stage["memory_bytes"]["gradients"] - wanted) <= 16


def test_expert_parallel_communication_by_hand() -> None:
    config = lane_config("{name: smat, steps: 2}", batch__window=3, parallel__expert_size=2)
    model = build_model(config.model, 0)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mlm_head"))
    (stage,) = plan_run(config, 4, 41)["stages"]
    sent = stage["communication_bytes"]
    # Each of four ranks reduces the rest with three others, and half of the experts with one.
    once = (trained - experts) * 4 * 3 // 4 + experts // 2 * 4 // 2
    assert sent["gradient_reduction"] == 2 * once
    key = "deepspeed__zero_optimization__use_multi_rank_bucket_allreduce"
    config = lane_config("{name: smat, steps: 2}", batch__window=3, parallel__expert_size=2, **{key: False})
    (stage,) = plan_run(config, 4, 41)["stages"]
    assert stage["communication_bytes"]["gradient_reduction"] == once
    # One lane, three positions; of 6 pairs of 4 experts, 5 have one at the other rank: all tokens go there.
    rows = 1 * 3 * config.model.seq_len
    assert sent["expert_all_to_all_per_layer_and_direction"] == rows * 64 * 4
    # In two layers there and back, and the gradients; with two numbers and two weights, which have gradients.
    assert abs(sent["expert_all_to_all"] - 2 * rows * 4 * (4 * 64 + 2 * 2 + 2)) <= 1
    assert stage["memory_bytes"]["weights"] == (trained - experts + experts // 2) * 4


@pytest.mark.parametrize(
    ("ranks", "experts", "top_k"), [(1, 4, 2), (2, 4, 1), (2, 6, 4), (3, 6, 2), (4, 8, 5)]
)
def test_a_token_goes_to_the_ranks_of_its_experts(ranks: int, experts: int, top_k: int) -> None:
    """Every set of experts is as likely as every other. If more than three in four go, all of them do."""
    moe = {"model__decoder__moe__num_experts": experts, "model__decoder__moe__top_k": top_k}
    config = lane_config("{name: smat, steps: 2}", batch__lanes=12, parallel__expert_size=ranks, **moe)
    (stage,) = plan_run(config, ranks, 41)["stages"]
    sets = list(combinations(range(experts), top_k))
    others = [len({number // (experts // ranks) for number in one} - {0}) for one in sets]
    share = sum(others) / len(sets) / max(1, ranks - 1)
    expected = stage["tokens_per_rank"] * (ranks - 1) * (1 if share > 0.75 else share) * 64 * 4
    found = stage["communication_bytes"]["expert_all_to_all_per_layer_and_direction"]
    assert abs(found - expected) <= 1


@pytest.mark.parametrize("name", ["context_sft", "smat"])
@pytest.mark.parametrize("window", [1, 4])
def test_the_estimate_of_activations_is_of_the_right_size(window: int, name: str) -> None:
    """Against the bytes that autograd keeps for the backward pass of full interactions."""
    config = lane_config(f"{{name: {name}, steps: 2, window: {window}}}", batch__window=7)
    module = lane_module(config)
    long = [
        [type(one).of([9] * 6, [8] * 6) for one in conversation]
        for conversation in random_conversations([6] * 6)
    ]
    assert len(long[0][0].tokens) == config.model.seq_len
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with windows(MemoryPieces(long), window=window) as steps:
        step = next(steps)
    (batch,) = step.batches
    stm = torch.zeros(2, 4, 6, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, *_ = module(batch, step.counts, stm)
    (stage,) = plan_run(config, 1, 41)["stages"]
    assert loss.requires_grad
    ratio = stage["memory_bytes"]["activations"] / np.sum(list(kept.values()))
    assert 0.5 < ratio < 2.0, ratio


def test_the_printed_plan_names_every_group_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "tiny", "--world-size", "4", "--vocab-size", "300"]
    assert main(["plan", *options]) == 0
    printed = capsys.readouterr().out
    found = plan(*options, capsys=capsys)
    assert "data_groups: {0 1 2 3}" in printed
    assert [stage["name"] for stage in found["stages"]] == [
        "joint_lm", "interaction_sft", "memory_attention", "smat",
    ]  # fmt: skip
    for stage in found["stages"]:
        for values in (stage["memory_bytes"], stage["communication_bytes"]):
            assert all(f"{name}: {size:,} bytes" in printed for name, size in values.items())
    assert all(f"{name}: {text}" in printed for name, text in found["basis"].items())


def test_without_a_vocabulary_embedding_and_heads_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "tiny", "--world-size", "1"]
    without = plan(*options, capsys=capsys)
    known = plan(*options, "--vocab-size", "300", capsys=capsys)
    assert without["vocab_size"] == 0
    sizes = [found["stages"][0]["memory_bytes"]["weights"] for found in (without, known)]
    assert sizes[1] - sizes[0] == 300 * (3 * 64 + 2) * 4  # embedding, two heads with biases
    assert main(["plan", *options]) == 0
    assert "give --vocab-size N" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tiny", "--world-size", "3"], "valid world sizes: 1, 2, 4, 8"),
        (["--config", "tiny", "--world-size", "0"], "world size: found 0 ranks"),
        (["--config", "tiny"], "--config needs --world-size N"),
        (["--config", "nope", "--world-size", "1"], "nope"),
        (["--config", "tiny", "--world-size", "8", "--set", "parallel.tensor_size=8"],
         "found 8; must divide model.encoder.attention.query_heads (4), valid: 1, 2, 4"),
        (["--config", "tiny", "--world-size", "2", "--set", "zero.stage=3",
          "--set", "parallel.expert_size=2"], "zero.stage: found 3, but parallel.expert_size is 2"),
        (["--config", "tiny", "--world-size", "2", "--set", "batch.lanes=3"], "batch.lanes (3)"),
        (["--model", "tiny", "--vocab-size", "90", "--world-size", "2"], "belong to --config"),
        (["--model", "tiny", "--vocab-size", "90", "--set", "seed=1"], "belong to --config"),
    ],
)  # fmt: skip
def test_refused_requests_are_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.startswith("error: ")
    assert len(output.err.splitlines()) == 1


def test_a_plan_is_of_a_model_or_of_a_run() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", "tiny", "--config", "tiny", "--world-size", "1"])
    assert stop.value.code == 2
