"""Small model configurations and reference computations that the model tests share."""

from __future__ import annotations

from typing import Any

import torch

from rxt_dist.config import ModelConfig
from rxt_dist.model import DecoderOutput, Memory, RxTModel, SequenceLayout

VOCAB = 41
SYMMETRIC = {"query_heads": 2, "kv_heads": 2}


def model_config(
    *, decoder: dict[str, Any] | None = None, encoder: dict[str, Any] | None = None, **top: Any
) -> ModelConfig:
    """A 2-layer model of width 32 with 4 experts; keyword arguments replace fields."""
    parts = {"num_layers": 2, "heads": 4, "ff_dim": 24, "attention": SYMMETRIC}
    moe = {"num_experts": 4, "top_k": 2}
    values = {
        "name": "sample",
        "vocab_size": VOCAB,
        "embed_dim": 32,
        "seq_len": 16,
        "stm_size": 8,
        "encoder": {**parts, **(encoder or {})},
        "decoder": {
            **parts,
            "cross_attention": SYMMETRIC,
            "dense_layer_dim": 40,
            "moe": moe,
            **(decoder or {}),
        },
        "memory_attention": {"heads": 4, "attention": SYMMETRIC},
        **top,
    }
    return ModelConfig.model_validate(values)


VARIANTS: dict[str, ModelConfig] = {
    "moe": model_config(),
    "dense": model_config(decoder={"moe": None}),
    "layer-norm": model_config(norm="layer", decoder={"head_norm": "layer", "stm_norm": False}),
    "reverse": model_config(
        encoder={"attention": {"query_heads": 1, "kv_heads": 4}},
        decoder={
            "attention": {"query_heads": 2, "kv_heads": 4, "output_bias": False},
            "cross_attention": {"query_heads": 4, "kv_heads": 1},
        },
    ),
    "gated-qk-norm": model_config(
        decoder={
            "attention": {**SYMMETRIC, "gated": True, "qk_norm": True},
            "cross_attention": {**SYMMETRIC, "gated": True, "qk_norm": True},
            "head_norm": "rms",
        }
    ),
    "no-rope-ungated-gelu": model_config(
        encoder={"use_rope": False, "gated_ff": False, "activation": "gelu"},
        decoder={"use_rope": False, "gated_ff": False, "activation": "relu"},
    ),
    "stateless": model_config(
        decoder={"stateless_layers": ["dense", "moe"], "final_stateless_layers": ["moe", "dense"]}
    ),
    "shared-1-global": model_config(
        decoder={"moe": {"num_experts": 4, "top_k": 1, "num_shared_experts": 1, "bias": "global"}}
    ),
    "shared-3-weighted": model_config(
        decoder={
            "moe": {
                "num_experts": 4,
                "top_k": 2,
                "num_shared_experts": 3,
                "shared_expert_dim": 20,
                "bias": "off",
                "shared_bias": "global",
                "weighted_shared_experts": True,
            }
        }
    ),
}


def random_tokens(lengths: list[int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def joint_pass(
    model: RxTModel, tokens: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, DecoderOutput, SequenceLayout]:
    """Encoder outputs of every layer, and the decoder reading them."""
    layout = SequenceLayout.from_lengths(lengths)
    layers = model.encoder(tokens, layout)
    return layers, model.decoder(tokens, layout, Memory.of_sequence(layers, layout)), layout


def joint_parameters(model: RxTModel) -> dict[str, torch.nn.Parameter]:
    """The parameters, by name, of what :func:`joint_pass` and the MLM head use."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("memory_attention.")
    }


def perturb(model: torch.nn.Module, seed: int = 3) -> None:
    """Move every parameter off special values (unit norms, zero biases) that could hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
