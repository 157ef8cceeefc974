"""A launched run against plain PyTorch: one process, one batch a step, autograd and torch.optim.AdamW."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import naive
from helpers.datasets import Datasets
from helpers.launch import run_ranks
from helpers.runs import SMALL, arguments, checkpoints, evaluations, metrics, relative, tensors

from rxt_dist.config import RunConfig, load_config
from rxt_dist.model import RxTModel, build_model

BETAS, EPS, DECAY, CLIP, PEAK, WARMUP = (0.9, 0.98), 1e-7, 0.05, 0.7, 2e-3, 2
MEANS = ("loss", "mlm_loss", "mlm_accuracy", "ar_loss", "ar_accuracy", "aux_loss")
SETTINGS = SMALL | {
    "batch.micro_packs": 1,
    "optimizer.betas": list(BETAS),
    "optimizer.eps": EPS,
    "optimizer.weight_decay": DECAY,
    "optimizer.clip_norm": CLIP,
    "optimizer.lr": PEAK,
    "optimizer.warmup_steps": WARMUP,
    "stages.1.encoder_loss_scale": 0.5,
    "stages.1.decoder_loss_scale": 2.0,
    "stages.1.optimizer.lr": PEAK / 2,
}


@pytest.fixture(scope="module")
def run(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks with 2 accumulation steps each."""
    folder = tmp_path_factory.mktemp("autograd")
    run_ranks(2, arguments(datasets, folder / "run", SETTINGS), folder).check()
    return folder / "run"


def rate(step: int, steps: int, peak: float) -> float:
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def train_stage(
    model: RxTModel, config: RunConfig, index: int
) -> tuple[list[dict[str, float]], torch.optim.AdamW]:
    """Train one stage; the records of its steps, and the optimizer with its moments."""
    stage = config.stages[index]
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, eps=EPS, weight_decay=DECAY)
    records = []
    with naive.whole_steps(config, index) as batches:
        for step in range(stage.steps):
            values = naive.means(model, [next(batches)])
            values["loss"] = naive.loss(values, config, index)
            optimizer.zero_grad()
            values["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            learning_rate = rate(step, stage.steps, stage.optimizer.lr or PEAK)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            record = {name: value.item() for name, value in values.items()}
            records.append(record | {"grad_norm": norm.item(), "lr": learning_rate})
    return records, optimizer


def canonical(model: RxTModel, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by parameter name -> by canonical name: fused projections cut at hand-written sizes.

    The memory attention, which no stage of this run trains, is left out.
    """
    config = model.config
    cut: dict[str, torch.Tensor] = {}
    for name, tensor in values.items():
        if name.startswith("memory_attention"):
            continue
        part = config.encoder if name.startswith("encoder") else config.decoder
        width = config.embed_dim // part.heads
        prefix = name.rpartition("qkv.")[0] or name.rpartition("kv.")[0] or name.rpartition("in_proj.")[0]
        if name.endswith("qkv.weight"):
            query, kv = part.attention.query_heads * width, part.attention.kv_heads * width
            names, sizes = ["q.weight", "k.weight", "v.weight"], [query, kv, kv]
        elif name.endswith("kv.weight"):
            kv = config.decoder.cross_attention.kv_heads * width
            names, sizes = ["k.weight", "v.weight"], [kv, kv]
        elif ".in_proj." in name:
            kind = name.rpartition(".")[2]
            names, sizes = [f"value.{kind}", f"gate.{kind}"], [tensor.shape[0] // 2] * 2
        else:
            prefix, names, sizes = name, [""], [tensor.shape[0]]
        for part_name, values_of_part in zip(names, tensor.split(sizes), strict=True):
            cut[prefix + part_name] = values_of_part
    return cut


def test_a_launched_run_is_plain_autograd_on_the_whole_batch(run: Path) -> None:
    """Every step, the weights and moments of every checkpoint, and the evaluations."""
    config = load_config(run / "config.yaml")
    model = build_model(config.model, config.seed)
    logged = metrics(run)
    for index, (step, folder) in enumerate(checkpoints(run).items()):
        records, optimizer = train_stage(model, config, index)
        assert min(record["grad_norm"] for record in records) > CLIP, "clipping would not be tested"
        for ours, theirs in zip(logged[step - len(records) : step], records, strict=True):
            errors = {name: relative(ours[name], theirs[name]) for name in (*MEANS, "grad_norm", "lr")}
            assert max(errors.values()) <= 1e-5, (ours["step"], errors)

        parameters = dict(model.named_parameters())
        expected = {"weight": {name: value.detach() for name, value in parameters.items()}}
        for kind in ("exp_avg", "exp_avg_sq"):
            states = {name: optimizer.state.get(value) for name, value in parameters.items()}
            expected[kind] = {name: state[kind] for name, state in states.items() if state}
        found = {name: value for name, value in tensors(folder).items() if "memory_attention" not in name}
        flat = {f"{kind}.{n}": v for kind, by in expected.items() for n, v in canonical(model, by).items()}
        assert found.keys() == flat.keys()
        for name, values in found.items():
            error = (values - flat[name]).abs().max() / flat[name].abs().max()
            assert error <= 1e-4, (step, name, float(error))

        with torch.no_grad():
            batches = naive.held_out(config, index)
            evaluated = naive.means(model, batches)
            evaluated["loss"] = naive.loss(evaluated, config, index)
        record = evaluations(run)[index]
        assert len(batches) == 3
        assert record["tokens"] == sum(len(batch.tokens) for batch in batches)
        errors = {name: relative(record[name], evaluated[name].item()) for name in MEANS}
        assert max(errors.values()) <= 1e-4, errors
