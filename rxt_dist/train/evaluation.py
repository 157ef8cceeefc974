"""Losses and accuracies on held-out data, over all ranks, and a few generated samples."""

from __future__ import annotations

import torch
import torch.distributed as dist

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.data.loader import evaluation_batches
from rxt_dist.data.pieces import PieceSource
from rxt_dist.parallel.bootstrap import World
from rxt_dist.randomness import derive_key
from rxt_dist.stages import StageModule


def evaluate(
    module: StageModule, source: PieceSource, config: RunConfig, stage: StageConfig, world: World
) -> dict[str, float]:
    """Means over the real tokens of the validation split: metric name -> value, and ``tokens``.

    The masked positions are drawn with a key of their own, so they are the same at every evaluation of
    every run with this seed. Collective: all ranks call it and get the same result.
    """
    special = config.model.special_tokens
    assert not isinstance(special, str)
    batches = evaluation_batches(
        source,
        key=derive_key(config.seed, "evaluation", stage.name),
        pack_tokens=config.batch.pack_tokens,
        dp_rank=world.rank,
        dp_size=world.size,
        masking_probability=stage.masking_probability,
        mask_id=special.mask,
        max_packs=config.evaluation.max_packs,
    )
    # float64 keeps integer sums exact; the columns are the total and the count of every metric.
    sums = torch.zeros(len(module.metric_names), 2, dtype=torch.float64, device=world.device)
    tokens = torch.zeros((), dtype=torch.float64, device=world.device)
    weights = dict.fromkeys(module.metric_names, 0.0)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for batch in batches:
            if batch is None:
                continue
            batch = batch.to(world.device)
            counts = module.local_counts(batch)
            terms = module.terms(batch)
            for row, name in enumerate(module.metric_names):
                weights[name] = terms[name].weight
                sums[row, 0] += terms[name].total.double()
                sums[row, 1] += counts[terms[name].count]
            tokens += counts["tokens"]
    module.train(was_training)
    packed = torch.cat([sums.flatten(), tokens.view(1)])
    dist.all_reduce(packed)
    values = packed.tolist()
    means = {
        name: values[2 * row] / max(1.0, values[2 * row + 1]) for row, name in enumerate(module.metric_names)
    }
    loss = sum(weights[name] * mean for name, mean in means.items())
    return {"loss": loss, **means, "tokens": values[-1]}
