"""What the loads of a step do to the next one, counted by hand; recomputation, frozen decoders, bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.engines import join_deepspeed, start_engine
from helpers.lanes import MemoryPieces, lane_config, lane_model, random_conversations, windows
from helpers.launch import run_function

from rxt_dist.config import MoEConfig, RunConfig
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import MoE
from rxt_dist.stages.expert_balance import ExpertBalance
from rxt_dist.stages.expert_statistics import BIAS_SPAN, count_loads, load_statistics

E, D, K = 5, 8, 2
BALANCED: dict[str, Any] = {"aux_loss": "switch", "bias_update_rate": 0.25}


def layers(count: int = 2, **fields: Any) -> dict[str, MoE]:
    found = {}
    for seed in range(count):
        config = MoEConfig(num_experts=E, top_k=K, **fields)
        found[f"layer{seed}"] = MoE(config, D, 8, gated=True, activation="silu")
        initialise(found[f"layer{seed}"], seed)
    return found


def rows(seed: int) -> torch.Tensor:
    return torch.randn(7 + seed, D, generator=torch.Generator().manual_seed(seed))


def loads_by_hand(layer: MoE, inputs: list[torch.Tensor], bias: list[float]) -> list[int]:
    loads = [0] * E
    for row in torch.cat(inputs):
        scores = torch.softmax(layer.router.proj.weight.detach() @ row, dim=0) + torch.tensor(bias)
        for expert in sorted(range(E), key=lambda e: -float(scores[e]))[:K]:
            loads[expert] += 1
    return loads


def test_two_steps_of_several_passes() -> None:
    """The second step is counted from zero, with the biases of the first."""
    found = layers(**BALANCED)
    balance = ExpertBalance(found)
    assert all(shares.tolist() == pytest.approx([1 / E] * E) for shares in balance.shares().values())
    bias = {name: [0.0] * E for name in found}
    for step in range(2):
        inputs = [rows(3 * step + number) for number in range(3)]
        loads = {name: loads_by_hand(layer, inputs, bias[name]) for name, layer in found.items()}
        balance.begin_step()
        for x in inputs:
            for layer in found.values():
                layer(x)
        balance.end_step()
        for name, layer in found.items():
            mean = sum(loads[name]) / E
            bias[name] = [
                b + 0.25 * ((n < mean) - (n > mean)) for b, n in zip(bias[name], loads[name], strict=True)
            ]
            assert layer.router.selection_bias.tolist() == bias[name]
            shares = [load / sum(loads[name]) for load in loads[name]]
            assert balance.shares()[name].tolist() == pytest.approx(shares)
            assert layer.shares is balance.shares()[name]


def test_a_rate_of_zero_keeps_biases_and_nothing_is_counted_in_vain() -> None:
    kept = layers(1, bias_update_rate=0.0)
    kept["layer0"].router.selection_bias.copy_(torch.linspace(-1, 1, E))
    before = kept["layer0"].router.selection_bias.clone()
    balance = ExpertBalance(kept)
    balance.begin_step()
    kept["layer0"](rows(0))
    balance.end_step()
    assert torch.equal(kept["layer0"].router.selection_bias, before)
    assert balance.shares() == {}

    plain = layers(1)
    balance = ExpertBalance(plain)
    balance.begin_step()
    assert plain["layer0"].loads is None
    balance.end_step()


def test_span_of_the_biases_is_observed() -> None:
    model = torch.nn.ModuleList(layers(**BALANCED).values())
    model[0].router.selection_bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.0, 0.25]))
    model[1].router.selection_bias.fill_(7.0)
    count_loads(model, torch.device("cpu"))
    assert load_statistics(model)[BIAS_SPAN] == 1.0
    plain = torch.nn.ModuleList(layers().values())
    count_loads(plain, torch.device("cpu"))
    assert BIAS_SPAN not in load_statistics(plain)


def smat(precision: str = "fp32", recompute: str = "none") -> RunConfig:
    own = {f"model__decoder__moe__{name}": value for name, value in BALANCED.items()}
    stage = "{name: smat, steps: 4, unfreeze: {decoder: 1}}"
    return lane_config(stage, batch__window=3, precision=precision, runtime__recompute=recompute, **own)


def train_lanes(folder: Any) -> None:
    """Three steps, recomputed or not, in fp32 and in bf16; the decoder joins after the first."""
    join_deepspeed()
    source = MemoryPieces(random_conversations([3, 1, 4, 2, 1, 5, 2, 3] * 3, longest=6))
    found = {}
    for precision, recompute in (("fp32", "none"), ("fp32", "interaction"), ("bf16", "none")):
        config = smat(precision, recompute)
        model = lane_model(config)
        engine = start_engine(config, model)
        stm = torch.zeros(2, 4, config.model.stm_size, config.model.embed_dim)
        record = []
        with windows(source, window=3) as steps:
            for number in range(3):
                step = next(steps)
                engine.begin_step(number, dict.fromkeys(engine.group_starts, 1e-3))
                for batch in step.batches:
                    loss, _, stm = engine.forward(batch, step.counts, stm)
                    engine.backward_and_step(loss)
                loads = [layer.loads.clone() for layer in model.modules() if isinstance(layer, MoE)]
                engine.end_step()
                buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
                record.append({"tokens": step.counts["tokens"], "loads": loads, "buffers": buffers})
        fragments = engine.owned_fragments()
        saved = {key: fragments[key].chunks[0][1].clone() for key in fragments if "selection_bias" in key}
        weights = {p.dtype for p in engine.engine.module.parameters()}
        found[f"{precision}-{recompute}"] = {
            "steps": record,
            "saved": saved,
            "bf16": torch.bfloat16 in weights,
        }
        engine.close()
    torch.save(found, folder / "found.pt")


def test_a_stage_counts_every_token_once_and_a_frozen_decoder_is_left_alone(tmp_path: Any) -> None:
    assert run_function(1, train_lanes, tmp_path) == [0]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, result in found.items():
        assert result["bf16"] == name.startswith("bf16")
        before = {key: torch.zeros(4) for key in result["steps"][0]["buffers"]}
        assert len(before) == 2
        moved = False
        for number, step in enumerate(result["steps"]):
            for loads, (key, bias) in zip(step["loads"], step["buffers"].items(), strict=True):
                assert loads.sum() == step["tokens"] * 2  # each token visits 2 experts, recomputed or not
                assert bias.dtype == torch.float32
                mean = loads.sum() / len(loads)
                moves = 0.25 * ((loads < mean).float() - (loads > mean).float()) * (number > 0)
                assert torch.equal(bias, before[key] + moves)
                before[key] = bias
                moved |= bool(moves.any())
        assert moved
        assert {key.removeprefix("weight.") for key in result["saved"]} == before.keys()
        assert all(torch.equal(result["saved"][f"weight.{key}"], bias) for key, bias in before.items())
    for ours, theirs in zip(found["fp32-none"]["steps"], found["fp32-interaction"]["steps"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours["loads"], theirs["loads"], strict=True))
