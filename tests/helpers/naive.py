"""The text stages in plain PyTorch: one process, one batch a step, stock losses, autograd.

Nothing of the stage modules, the engine or the checkpoint reader is used; model and data are the only parts
in common with what is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from rxt_dist.config import RunConfig, SpecialTokens
from rxt_dist.data.batch import TextBatch
from rxt_dist.data.loader import TextLoader, evaluation_batches
from rxt_dist.data.pieces import InteractionPieces, TextPieces
from rxt_dist.data.reader import Dataset
from rxt_dist.model import Memory, RxTModel
from rxt_dist.randomness import derive_key

LOSSES = ("mlm_loss", "ar_loss", "aux_loss")
AUX_SCALE = 0.01


def sums(model: RxTModel, batch: TextBatch) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Summed losses and correct predictions of a batch by metric name, and what each is divided by."""
    layers = model.encoder(batch.masked_tokens, batch.layout)
    mlm_logits = model.mlm_head(layers[-1]) @ model.mlm_head.weight.T + model.mlm_head.bias
    memory = Memory.of_sequence(layers.detach(), batch.layout)
    output = model.decoder(batch.tokens, batch.layout, memory)
    ar_logits = output.hidden @ model.decoder.lm_head.weight.T + model.decoder.lm_head.bias
    masked, rows = batch.masked_index, batch.next_index
    targets = batch.tokens[rows + 1]
    totals = {
        "mlm_loss": F.cross_entropy(mlm_logits[masked], batch.tokens[masked], reduction="sum"),
        "mlm_accuracy": (mlm_logits[masked].argmax(-1) == batch.tokens[masked]).float().sum(),
        "ar_loss": F.cross_entropy(ar_logits[rows], targets, reduction="sum"),
        "ar_accuracy": (ar_logits[rows].argmax(-1) == targets).float().sum(),
        "aux_loss": output.aux_sum,
    }
    counts = {"mlm_loss": len(masked), "ar_loss": len(rows), "aux_loss": len(batch.tokens)}
    return totals, counts | {"mlm_accuracy": len(masked), "ar_accuracy": len(rows)}


def means(model: RxTModel, batches: list[TextBatch]) -> dict[str, torch.Tensor]:
    """Means over all batches together by metric name."""
    parts = [sums(model, batch) for batch in batches]
    return {
        name: torch.stack([totals[name] for totals, _ in parts]).sum()
        / sum(counts[name] for _, counts in parts)
        for name in parts[0][0]
    }


def loss(values: dict[str, torch.Tensor], config: RunConfig, index: int) -> torch.Tensor:
    """The training loss of stage ``index`` from its means."""
    stage = config.stages[index]
    decoder_part = values["ar_loss"] + AUX_SCALE * values["aux_loss"]
    return stage.encoder_loss_scale * values["mlm_loss"] + stage.decoder_loss_scale * decoder_part


@contextmanager
def whole_steps(config: RunConfig, index: int) -> Iterator[Iterator[TextBatch]]:
    """The steps of stage ``index`` from its beginning, each as a single batch."""
    stage = config.stages[index]
    with TextLoader(
        _pieces(config, index, "train"),
        key=derive_key(config.seed, "stage", stage.name, index),
        packs=config.batch.packs,
        pack_tokens=config.batch.pack_tokens,
        micro_packs=config.batch.packs,
        dp_rank=0,
        dp_size=1,
        masking_probability=stage.masking_probability,
        mask_id=_special(config).mask,
    ) as loader:
        yield (step.batches[0] for step in loader)


def held_out(config: RunConfig, index: int) -> list[TextBatch]:
    """The validation packs of stage ``index``."""
    stage = config.stages[index]
    packs = evaluation_batches(
        _pieces(config, index, "val"),
        key=derive_key(config.seed, "evaluation", stage.name),
        pack_tokens=config.batch.pack_tokens,
        dp_rank=0,
        dp_size=1,
        masking_probability=stage.masking_probability,
        mask_id=_special(config).mask,
        max_packs=config.evaluation.max_packs,
    )
    return [pack for pack in packs if pack is not None]


def _pieces(config: RunConfig, index: int, split: str) -> TextPieces | InteractionPieces:
    text = config.stages[index].name == "joint_lm"
    folder = config.data.text if text else config.data.conversations
    assert folder is not None
    dataset = Dataset(folder, "train" if split == "train" else "val")
    return (TextPieces if text else InteractionPieces)(dataset, config.model.seq_len)


def _special(config: RunConfig) -> SpecialTokens:
    assert isinstance(config.model.special_tokens, SpecialTokens)
    return config.model.special_tokens
