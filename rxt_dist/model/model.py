"""All components of one model, and their sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rxt_dist.config import ModelConfig
from rxt_dist.model.attention import SelfAttention
from rxt_dist.model.decoder import Decoder
from rxt_dist.model.encoder import Encoder
from rxt_dist.model.heads import MLMHead
from rxt_dist.model.initialisation import Distribution, Normal, Uniform, initialise, linear_default
from rxt_dist.model.memory_attention import MemoryAttention
from rxt_dist.model.moe import MoE, Router


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

    def reset_statistics(self) -> None:
        """Give buffers their initial values: running means of norms, selection biases of experts."""
        self.memory_attention.reset_statistics()
        for module in self.modules():
            if isinstance(module, Router):
                module.reset_statistics()

    def initial_distributions(self) -> dict[str, Distribution]:
        bound = linear_default(self.config.embed_dim).bound * self.config.query_key_init_scale
        return {
            "encoder.embedding.weight": Normal(std=self.config.embedding_std),
            **{
                f"{name}.{part}.weight": Uniform(bound)
                for name, module in self.named_modules()
                if isinstance(module, SelfAttention)
                for part in ("q", "k")
            },
        }


def build_model(config: ModelConfig, seed: int, reduce: Callable[[RxTModel], None] | None = None) -> RxTModel:
    """A model on the CPU in fp32 whose parameters are a pure function of ``config`` and ``seed``.

    ``reduce`` may replace modules by such that hold a part of their parameters, before memory is taken for
    any; what is left gets the values that it has in the whole model.

    Raises:
        ConfigError: ``vocab_size`` is still ``auto``.
    """
    model = empty_model(config)
    if reduce is not None:
        reduce(model)
    model.to_empty(device="cpu")
    initialise(model, seed)
    model.reset_statistics()
    return model


def empty_model(config: ModelConfig) -> RxTModel:
    """A model that has shapes and no values, in no memory."""
    with torch.device("meta"), _Unfilled():
        return RxTModel(config)


def count_parameters(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Parameters of a model with this vocabulary, without memory for any of them.

    Returns:
        Counts by name. ``total``: sum of the final model's components, without the MLM head. ``unique``:
        the same with the shared embedding counted once. ``active``: ``unique`` less the experts that a token
        does not visit. ``encoder``, ``decoder``, ``memory_attention``, ``mlm_head``: each by itself, the
        embedding included where it has one. ``decoder_active``: ``decoder`` less the experts that a token
        does not visit. ``embedding``: the embedding that encoder and decoder share.
    """
    model = empty_model(config.model_copy(update={"vocab_size": vocab_size}))
    components = {name: _numel(component) for name, component in model.named_children()}
    idle = sum(_idle(module) for module in model.decoder.modules() if isinstance(module, MoE))
    unique = _numel(model) - components["mlm_head"]
    return {
        "total": sum(components.values()) - components["mlm_head"],
        "unique": unique,
        "active": unique - idle,
        "encoder": components["encoder"],
        "decoder": components["decoder"],
        "decoder_active": components["decoder"] - idle,
        "memory_attention": components["memory_attention"],
        "mlm_head": components["mlm_head"],
        "embedding": _numel(model.encoder.embedding),
    }


class _Unfilled(TorchFunctionMode):
    """Skips the initialisation of modules: on the meta device it costs a second of imports for nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _idle(moe: MoE) -> int:
    """Parameters of the experts that one token leaves out."""
    experts, visited = moe.config.num_experts, moe.config.top_k
    return _numel(moe.experts) * (experts - visited) // experts
