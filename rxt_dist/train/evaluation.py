"""Held-out results at the end of a stage, over all ranks: losses, accuracies, samples, memory gain."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer

from rxt_dist.config import RunConfig, SpecialTokens, StageConfig
from rxt_dist.data.conversations import MixedConversations
from rxt_dist.data.loader import evaluation_batches
from rxt_dist.data.pieces import InteractionPieces, PieceSource
from rxt_dist.parallel.bootstrap import World
from rxt_dist.parallel.collectives import sum_over_ranks
from rxt_dist.parallel.experts import uneven_passes
from rxt_dist.randomness import derive_key
from rxt_dist.stages import Pieces, StageModule, TextStageModule
from rxt_dist.stages.context import ContextModule
from rxt_dist.stages.lane_stage import LaneStageModule
from rxt_dist.stages.smat import SmatModule
from rxt_dist.train.memory_evaluation import evaluate_context, evaluate_memory, evaluate_updates
from rxt_dist.train.sampling import sample_continuations


def evaluate_stage(
    module: StageModule,
    source: Pieces,
    config: RunConfig,
    stage: StageConfig,
    world: World,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Results of a stage on the validation split; what ``eval.jsonl`` holds of it.

    Collective: all ranks call it and get the same numbers; samples are made by the first data-parallel rank
    only. The module is in evaluation mode (no noise, no dropout) meanwhile.
    """
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            if isinstance(module, TextStageModule):
                results: dict[str, Any] = evaluate_text(module, source, config, stage, world)
                with uneven_passes(module):
                    if world.dp_rank == 0:
                        results["samples"] = _samples(module, source, config, world, tokenizer)
                return results
            assert isinstance(source, InteractionPieces | MixedConversations)
            if isinstance(module, ContextModule):
                return evaluate_context(module, source, config, stage, world)
            assert isinstance(module, LaneStageModule)
            if isinstance(module, SmatModule):
                return evaluate_memory(module, source, config, world)
            return evaluate_updates(module, source, config, world)
    finally:
        module.train(was_training)


def evaluate_text(
    module: TextStageModule, source: PieceSource, config: RunConfig, stage: StageConfig, world: World
) -> dict[str, float]:
    """Means over the real tokens of the validation split: metric name -> value, and ``tokens``.

    The masked positions are drawn with a key of their own, so they are the same at every evaluation of
    every run with this seed.
    """
    special = config.model.special_tokens
    assert isinstance(special, SpecialTokens)
    batches = evaluation_batches(
        source,
        key=derive_key(config.seed, "evaluation", stage.name),
        pack_tokens=config.batch.pack_tokens,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        masking_probability=stage.masking_probability,
        mask_id=special.mask,
        max_packs=config.evaluation.max_packs,
    )
    # float64 keeps integer sums exact; the columns are the total and the count of every metric.
    sums = torch.zeros(len(module.metric_names), 2, dtype=torch.float64, device=world.device)
    tokens = torch.zeros((), dtype=torch.float64, device=world.device)
    with uneven_passes(module):
        for batch in (batch.to(world.device) for batch in batches if batch is not None):
            counts = module.local_counts(batch)
            terms = module.terms(batch)
            for row, name in enumerate(module.metric_names):
                sums[row, 0] += terms[name].total.double()
                sums[row, 1] += counts[terms[name].count]
            tokens += counts["tokens"]
    packed = torch.cat([sums.flatten(), tokens.view(1)])
    sum_over_ranks(packed)
    values = packed.tolist()
    means = {
        name: values[2 * row] / max(1.0, values[2 * row + 1]) for row, name in enumerate(module.metric_names)
    }
    loss = sum(module.weights[name] * mean for name, mean in means.items())
    return {"loss": loss, **means, "tokens": values[-1]}


def _samples(
    module: TextStageModule, source: PieceSource, config: RunConfig, world: World, tokenizer: Tokenizer
) -> list[dict[str, str]]:
    special = config.model.special_tokens
    assert isinstance(special, SpecialTokens)
    return sample_continuations(
        module,
        source,
        tokenizer,
        config.evaluation,
        seq_len=config.model.seq_len,
        end_token=special.eos,
        device=world.device,
    )
