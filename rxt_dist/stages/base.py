"""What every stage offers the trainer: a module that turns a micro-batch into sums, and who trains.

A stage never divides: it returns sums over its micro-batch, each with the name of the global count that
the trainer divides by. The gradient is then the same for every division of the step into ranks and
micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rxt_dist.data.batch import TextBatch
from rxt_dist.model import SequenceLayout

CROSS_ENTROPY_CHUNK = 4096


@dataclass(frozen=True)
class Term:
    """One summed quantity of a micro-batch.

    ``total`` is a scalar (fp32 or integer), ``count`` the key of the count it is divided by, and
    ``weight`` its factor in the training loss (0 for a metric that is only reported).
    """

    total: torch.Tensor
    count: str
    weight: float = 0.0


class StageModule(nn.Module, ABC):
    """The parts of the model that a stage runs, wrapped for the engine.

    Only submodules the stage uses are registered, so that the engine neither moves nor casts the rest.
    """

    metric_names: tuple[str, ...]
    """Names of the terms, in a fixed order known before the first batch."""

    @abstractmethod
    def terms(self, batch: TextBatch) -> dict[str, Term]:
        """Sums of one micro-batch by metric name; the names are exactly ``metric_names``."""

    @abstractmethod
    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Registered parameters that take no part in training."""

    @abstractmethod
    def local_counts(self, batch: TextBatch) -> dict[str, int]:
        """What the micro-batch adds to each count that ``terms`` divides by."""

    @property
    @abstractmethod
    def generates(self) -> bool:
        """Whether the stage has a decoder that can continue a text."""

    @abstractmethod
    def next_token_logits(self, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """Logits [B, V] of the token after each of the B sequences in ``tokens`` [N]."""

    def forward(self, batch: TextBatch, counts: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one micro-batch and its metrics, both as shares of the global step.

        ``counts`` are the global counts of the step. Returns the scalar loss and the metric vector
        [1 + len(metric_names)] (the loss first); summed over all micro-batches and ranks they are the
        step's values. A count of zero contributes zero.
        """
        terms = self.terms(batch)
        shares = [terms[name].total.float() / max(1, counts[terms[name].count]) for name in self.metric_names]
        loss = torch.stack(
            [share * terms[name].weight for share, name in zip(shares, self.metric_names, strict=True)]
        ).sum()
        return loss, torch.stack([loss.detach(), *(share.detach() for share in shares)])

    def freeze(self) -> None:
        """Take the frozen parameters out of training; must precede the engine."""
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)


def uses(components: str, part: str) -> bool:
    """Whether a stage's ``components`` setting includes ``part`` (``encoder`` or ``decoder``)."""
    return components in ("joint", part)
