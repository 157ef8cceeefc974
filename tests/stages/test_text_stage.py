"""The text stages against padded PyTorch, and what may and may not depend on what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stage_samples import MASK, PIECES, RandomPieces, batch_of, run_config, sample_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rxt_dist.config import RunConfig
from rxt_dist.data.batch import TextBatch
from rxt_dist.model import Memory, RxTModel, SequenceLayout
from rxt_dist.stages import StageModule, build_stage

ALL = range(len(PIECES.lengths))
COUNTS = {"tokens": 100, "masked": 20, "next": 40}


def stage_of(config: RunConfig, model: RxTModel | None = None) -> StageModule:
    return build_stage(model or sample_model(config), config, config.stages[0])


def values_of(stage: StageModule, batch: TextBatch, counts: dict[str, int] | None = None) -> dict[str, float]:
    """Loss and metrics of a micro-batch by name."""
    _, metrics, *_ = stage(batch, counts or stage.local_counts(batch))
    return dict(zip(("loss", *stage.metric_names), metrics.tolist(), strict=True))


def train_a_little(stage: StageModule, batch: TextBatch) -> None:
    """Until some predictions are right and others wrong."""
    optimizer = torch.optim.AdamW(stage.parameters(), lr=5e-3)
    for _ in range(4):
        optimizer.zero_grad()
        stage(batch, stage.local_counts(batch))[0].backward()
        optimizer.step()


def padded(rows: Sequence[torch.Tensor], length: int, fill: float) -> torch.Tensor:
    """[B, length, ...] from B tensors [n, ...]."""
    return torch.stack(
        [torch.cat([row, row.new_full((length - len(row), *row.shape[1:]), fill)]) for row in rows]
    )


def padded_reference(model: RxTModel, masked_tokens: dict[int, torch.Tensor]) -> dict[str, float]:
    """Means by metric name, each sequence run by itself and all logits padded to one length.

    ``masked_tokens`` holds the encoder's input of every piece. Labels of -100 are not predicted.
    """
    mlm_logits, mlm_labels, ar_logits, ar_labels, aux, tokens_seen = [], [], [], [], 0.0, 0
    for piece, masked in masked_tokens.items():
        content = PIECES.read(piece)
        tokens = torch.from_numpy(content.tokens)
        layout = SequenceLayout.from_lengths([len(tokens)])
        layers = model.encoder(masked, layout)
        output = model.decoder(tokens, layout, Memory.of_sequence(layers, layout))
        mlm_logits.append(F.linear(model.mlm_head(layers[-1]), model.mlm_head.weight, model.mlm_head.bias))
        ar_logits.append(model.decoder.lm_head(output.hidden))
        mlm_labels.append(torch.where(masked == MASK, tokens, -100))
        following = torch.cat([tokens[1:], tokens.new_tensor([-100])])
        supervised = torch.arange(len(tokens)) >= content.first_target - 1
        ar_labels.append(torch.where(supervised, following, -100))
        aux += output.aux_sum.item()
        tokens_seen += len(tokens)
    longest = int(PIECES.lengths.max())
    result = {"aux_loss": aux / tokens_seen}
    for name, logits, labels in (("mlm", mlm_logits, mlm_labels), ("ar", ar_logits, ar_labels)):
        scores, targets = padded(logits, longest, 0.0), padded(labels, longest, -100)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100)
        known = targets != -100
        correct = (scores.argmax(-1) == targets)[known].float().mean()
        result |= {f"{name}_loss": loss.item(), f"{name}_accuracy": correct.item()}
    return result


def split_by_piece(batch: TextBatch, pieces: Sequence[int], values: torch.Tensor) -> dict[int, torch.Tensor]:
    sizes = [int(PIECES.lengths[piece]) for piece in pieces]
    return dict(zip(pieces, values.split(sizes, dim=-1 if values.dim() == 1 else 1), strict=True))


@pytest.mark.parametrize("moe", ["default", "null"])
def test_losses_and_accuracies_are_those_of_padded_sequences(moe: str) -> None:
    config = run_config(*(() if moe == "default" else (f"model.decoder.moe={moe}",)))
    model = sample_model(config)
    batch = batch_of(ALL)
    train_a_little(stage_of(config, model), batch)
    with torch.no_grad():
        values = values_of(stage_of(config, model), batch)
        expected = padded_reference(model, split_by_piece(batch, ALL, batch.masked_tokens))
    if moe == "null":
        del expected["aux_loss"]
    assert 0 < expected["mlm_accuracy"] < 1
    assert 0 < expected["ar_accuracy"] < 1
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert values.keys() == {"loss", *expected}
    scale = 0.01 * expected.get("aux_loss", 0.0)
    assert values["loss"] == pytest.approx(expected["mlm_loss"] + expected["ar_loss"] + scale, rel=1e-5)


def test_sums_are_divided_by_the_counts_of_the_whole_step() -> None:
    """Shares of several micro-batches add up to the values of the step."""
    config = run_config("stages.0.encoder_loss_scale=0.3", "stages.0.decoder_loss_scale=3")
    stage = stage_of(config)
    batches = [batch_of([0, 1]), batch_of([2, 4]), batch_of([3, 5])]
    counts: dict[str, int] = {}
    for batch in batches:
        for name, count in stage.local_counts(batch).items():
            counts[name] = counts.get(name, 0) + count
    assert counts == stage.local_counts(batch_of(ALL))
    parts = [values_of(stage, batch, counts) for batch in batches]
    whole = values_of(stage, batch_of(ALL))
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, rel=1e-5)
    expected = 0.3 * whole["mlm_loss"] + 3 * (whole["ar_loss"] + 0.01 * whole["aux_loss"])
    assert whole["loss"] == pytest.approx(expected, rel=1e-5)


def test_counts_of_zero_contribute_zero() -> None:
    stage = stage_of(run_config())
    batch = batch_of([4], masking=1e-9)  # one token, not masked, nothing to predict
    assert stage.local_counts(batch) == {"tokens": 1, "masked": 0, "next": 0}
    values = values_of(stage, batch)
    assert (values["mlm_loss"], values["ar_loss"]) == (0.0, 0.0)
    assert (values["mlm_accuracy"], values["ar_accuracy"]) == (0.0, 0.0)


VARIANTS = {
    "joint": (),
    "encoder": ("stages.0.components=encoder",),
    "decoder": ("stages.0.components=decoder",),
    "joint, disturbed": ("stages.0.noise_level=0.1", "stages.0.slot_dropout=0.5"),
    "joint, decoder loss only": ("stages.0.encoder_loss_scale=0",),
    "joint, dense": ("model.decoder.moe=null",),
    "joint, two shared experts": ("model.decoder.moe.num_shared_experts=2",),
    "joint, no balance loss": ("model.decoder.moe.aux_loss=none",),
    "joint, stateless layers": (
        "model.decoder.stateless_layers=[dense, moe]",
        "model.decoder.final_stateless_layers=[moe, dense]",
    ),
    "encoder with unused cross-attention": (
        "stages.0.components=encoder",
        "model.encoder.memory_cross_attention={query_heads: 4, kv_heads: 4}",
    ),
}
BATCHES = {
    "ordinary": ([0, 1, 3], 0.3),
    "no masked token": ([0, 1, 3], 1e-9),
    "nothing to predict": ([4], 0.999),
    "one token, neither": ([4], 1e-9),
}


@pytest.mark.parametrize("content", BATCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_gets_a_gradient(variant: str, content: str) -> None:
    """Whatever the batch holds: engines reduce in buckets and would wait for a missing gradient."""
    stage = stage_of(run_config(*VARIANTS[variant]))
    stage.freeze()
    pieces, masking = BATCHES[content]
    loss, *_ = stage(batch_of(pieces, masking=masking), COUNTS)
    loss.backward()
    trainable = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    assert trainable
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable.values())
    frozen = [name for name, p in stage.named_parameters() if not p.requires_grad]
    assert all(p.grad is None for p in stage.parameters() if not p.requires_grad)
    assert bool(frozen) == (variant in ("decoder", "encoder with unused cross-attention"))


def gradients(config: RunConfig) -> dict[str, torch.Tensor]:
    """Gradients of the whole model after one backward pass of the stage; zeros where there is none."""
    model = sample_model(config)
    loss, *_ = stage_of(config, model)(batch_of(ALL), COUNTS)
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def test_the_losses_meet_only_in_the_embedding() -> None:
    """The encoder learns nothing from the decoder's loss, nor the decoder from the encoder's."""
    embedding = "encoder.embedding.weight"
    decoder_only = gradients(run_config("stages.0.encoder_loss_scale=0"))
    touched = {name for name, gradient in decoder_only.items() if gradient.any()}
    assert {name for name in touched if not name.startswith("decoder.")} == {embedding}
    assert touched >= {f"decoder.layers.{i}.cross_attention.kv.weight" for i in (0, 1)}

    encoder_only = gradients(run_config("stages.0.decoder_loss_scale=0"))
    touched = {name for name, gradient in encoder_only.items() if gradient.any()}
    assert {name for name in touched if not name.startswith(("encoder.", "mlm_head."))} == set()
    both = gradients(run_config())
    total = decoder_only[embedding] + encoder_only[embedding]
    torch.testing.assert_close(both[embedding], total, rtol=1e-4, atol=1e-6)


DISTURBED = ("stages.0.noise_level=0.3", "stages.0.slot_dropout=0.4")


def memory_states(stage: StageModule, batch: TextBatch) -> torch.Tensor:
    """The memory [L, N, D] that the decoder of ``stage`` reads."""
    layers = stage.encoder(batch.masked_tokens, batch.layout)
    return stage.memory(layers, batch.layout, batch.token_keys).states


class _Results(TorchDispatchMode):
    """Shapes of the tensors that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.shapes |= {x.shape for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found


@pytest.mark.parametrize(("changes", "whole"), [((), False), (DISTURBED, True)])
def test_the_layers_of_the_encoder_are_not_copied(changes: tuple[str, ...], whole: bool) -> None:
    """Nor are their gradients; a memory that is disturbed is a copy anyway."""
    stage, batch = stage_of(run_config(*changes)), batch_of(ALL)
    every_layer = torch.Size([2, len(batch.tokens), 32])
    with _Results() as results:
        terms = stage.terms(batch)
    assert (every_layer in results.shapes) == whole
    with _Results() as results:
        (terms["mlm_loss"].total + terms["ar_loss"].total).backward()
    assert results.shapes
    assert every_layer not in results.shapes


def test_noise_and_slot_dropout_are_functions_of_the_token_alone() -> None:
    stage = stage_of(run_config(*DISTURBED))
    one, other = list(ALL), [5, 3, 0, 4, 2, 1]
    with torch.no_grad():
        first = split_by_piece(batch_of(one), one, memory_states(stage, batch_of(one)))
        second = split_by_piece(batch_of(other), other, memory_states(stage, batch_of(other)))
        for piece in ALL:
            alone = memory_states(stage, batch_of([piece]))
            torch.testing.assert_close(first[piece], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(second[piece], alone, rtol=1e-4, atol=1e-5)
    totals = [values_of(stage, batch)["ar_loss"] for batch in (batch_of(one), batch_of(other))]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_another_visit_of_a_piece_is_disturbed_differently() -> None:
    stage = stage_of(run_config(*DISTURBED))
    with torch.no_grad():
        visits = [batch_of([1], masking=1e-9, epoch=epoch) for epoch in (0, 1)]
        assert torch.equal(visits[0].masked_tokens, visits[1].masked_tokens)
        first, second = (values_of(stage, batch)["ar_loss"] for batch in visits)
    assert first != second


def test_disturbances_have_the_strength_that_the_stage_states() -> None:
    source = RandomPieces([500, 500])
    batch = batch_of([0, 1], source=source)
    clean = stage_of(run_config())
    with torch.no_grad():
        layers = clean.encoder(batch.masked_tokens, batch.layout)
        dropped = memory_states(stage_of(run_config("stages.0.slot_dropout=0.4")), batch)
        noisy = memory_states(stage_of(run_config("stages.0.noise_level=0.3")), batch)
    rows = (dropped == 0).all(dim=-1)  # [L, N]
    assert torch.equal(dropped[~rows], layers[~rows]), "rows that stay are not scaled"
    assert rows.float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert (rows[0] != rows[1]).float().mean().item() == pytest.approx(0.48, abs=0.06), "layers by themselves"
    noise = noisy - layers
    assert noise.mean().item() == pytest.approx(0.0, abs=0.005)
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert abs((noise[0] * noise[1]).mean().item()) < 0.003, "layers by themselves"


def test_nothing_is_disturbed_in_evaluation() -> None:
    model = sample_model(run_config())
    disturbed, clean = stage_of(run_config(*DISTURBED), model), stage_of(run_config(), model)
    batch = batch_of(ALL)
    with torch.no_grad():
        assert values_of(disturbed, batch)["ar_loss"] != values_of(clean, batch)["ar_loss"]
        disturbed.eval()
        assert values_of(disturbed, batch) == values_of(clean, batch)


def test_a_decoder_alone_reads_one_constant_memory() -> None:
    """The same initial memory for every sequence, step and mesh; it has no noise and no gradient."""
    config = run_config("stages.0.components=decoder", *DISTURBED)
    stage = stage_of(config)
    with torch.no_grad():
        first = stage.memory(None, batch_of([0]).layout, batch_of([0]).token_keys).states
        second = stage.memory(None, batch_of(ALL).layout, batch_of(ALL).token_keys).states
        other = stage_of(run_config("stages.0.components=decoder", "seed=5"))
        another = other.memory(None, batch_of([0]).layout, None).states
        whole = values_of(stage, batch_of([0, 1]))["ar_loss"] * 10
        parts = [values_of(stage, batch_of([piece]))["ar_loss"] for piece in (0, 1)]
    assert first.shape == (2, 5, 32)
    assert torch.equal(first, second)
    assert not torch.equal(first, another)
    assert whole == pytest.approx(6 * parts[0] + 4 * parts[1], rel=1e-5)


def test_generation_continues_with_what_training_predicts() -> None:
    """Logits after a sequence are those of its last row, with the memory of the tokens so far."""
    model = sample_model(run_config())
    stage = stage_of(run_config(), model).eval()
    first, second = torch.arange(7, 12), torch.arange(20, 29)
    layout = SequenceLayout.from_lengths([len(first), len(second)])
    with torch.no_grad():
        logits = stage.next_token_logits(torch.cat([first, second]), layout)
        for row, tokens in zip(logits, (first, second), strict=True):
            alone = SequenceLayout.from_lengths([len(tokens)])
            memory = Memory.of_sequence(model.encoder(tokens, alone), alone)
            hidden = model.decoder(tokens, alone, memory).hidden
            torch.testing.assert_close(row, model.decoder.lm_head(hidden[-1]), rtol=1e-4, atol=1e-5)
