"""Using a trained model: conversations with memory, continuation of texts, filling in masked tokens."""

from rxt_dist.inference.completion import complete
from rxt_dist.inference.conversation import Conversation, Reply, ReplyStream, generate
from rxt_dist.inference.fill_mask import Candidate, fill_mask
from rxt_dist.inference.sampler import Sampling

__all__ = [
    "Candidate",
    "Conversation",
    "Reply",
    "ReplyStream",
    "Sampling",
    "complete",
    "fill_mask",
    "generate",
]
