"""All components of one model, and their sizes."""

from __future__ import annotations

import torch
from torch import nn

from rxt_dist.config import ModelConfig
from rxt_dist.model.decoder import Decoder
from rxt_dist.model.encoder import Encoder
from rxt_dist.model.heads import MLMHead
from rxt_dist.model.initialisation import Distribution, Normal, initialise
from rxt_dist.model.memory_attention import MemoryAttention
from rxt_dist.model.moe import MoE


class RxTModel(nn.Module):
    """Encoder, decoder, MLM head and memory attention; encoder and decoder share one embedding parameter.

    The components are called one by one: what flows between them is a stage's business.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.decoder.embedding = self.encoder.embedding
        self.mlm_head = MLMHead(config)
        self.memory_attention = MemoryAttention(config)

    def initial_distributions(self) -> dict[str, Distribution]:
        return {"encoder.embedding.weight": Normal(std=self.config.embedding_std)}


def build_model(config: ModelConfig, seed: int) -> RxTModel:
    """A model on the CPU in fp32 whose parameters are a pure function of ``config`` and ``seed``.

    Raises:
        ConfigError: ``vocab_size`` is still ``auto``.
    """
    with torch.device("meta"):
        model = RxTModel(config)
    model.to_empty(device="cpu")
    initialise(model, seed)
    model.memory_attention.reset_statistics()
    return model


def count_parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters of a model with this vocabulary, without building it.

    Returns:
        Counts by name. ``encoder``, ``decoder``, ``mlm_head``, ``memory_attention``: each by itself,
        embedding included. ``total``: sum of the final model's components, without
        the MLM head. ``unique``: the same with the shared embedding counted once. ``decoder_active`` and
        ``active``: ``decoder`` and ``unique`` less the experts that a token does not visit.
    """
    with torch.device("meta"):
        model = RxTModel(config.model_copy(update={"vocab_size": vocab_size}))
    counts = {name: _numel(component) for name, component in model.named_children()}
    idle = sum(_idle(module) for module in model.decoder.modules() if isinstance(module, MoE))
    final = nn.ModuleList(child for name, child in model.named_children() if name != "mlm_head")
    counts["total"] = sum(_numel(component) for component in final)
    counts["unique"] = _numel(final)
    counts["active"] = counts["unique"] - idle
    counts["decoder_active"] = counts["decoder"] - idle
    return counts


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _idle(moe: MoE) -> int:
    """Parameters of the experts that one token leaves out."""
    experts, visited = moe.config.num_experts, moe.config.top_k
    return _numel(moe.experts) * (experts - visited) // experts
