"""Checkpoints: saving, verified loading, retention."""

from rxt_dist.checkpoint.load import CheckpointReader, find_checkpoint, locate_checkpoint
from rxt_dist.checkpoint.save import save_checkpoint
from rxt_dist.checkpoint.state import TrainerState

__all__ = ["CheckpointReader", "TrainerState", "find_checkpoint", "locate_checkpoint", "save_checkpoint"]
