"""The mathematics of a Reactive Transformer: pure functions of tokens, layouts and explicit memory."""

from rxt_dist.model.decoder import Decoder, DecoderOutput
from rxt_dist.model.encoder import Encoder
from rxt_dist.model.heads import LMHead, MLMHead
from rxt_dist.model.layout import SequenceLayout
from rxt_dist.model.memory import Memory
from rxt_dist.model.memory_attention import MemoryAttention
from rxt_dist.model.model import RxTModel, build_model, count_parameters

__all__ = [
    "Decoder",
    "DecoderOutput",
    "Encoder",
    "LMHead",
    "MLMHead",
    "Memory",
    "MemoryAttention",
    "RxTModel",
    "SequenceLayout",
    "build_model",
    "count_parameters",
]
