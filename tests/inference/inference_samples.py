"""Small models with every switch that generation meets, and tokenizers for them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rxt_dist.config import ModelConfig
from rxt_dist.data.tokens import SPECIAL_TOKENS
from rxt_dist.model import RxTModel, build_model

PAD, UNK, BOS, EOS, MASK, QUERY, ANSWER = range(7)
FIRST_WORD, VOCAB = 11, 60  # words w11, w12, ...; the special tokens are before them
LAYERS, SLOTS, WIDTH, SEQ_LEN = 2, 6, 32, 40
SPECIAL = {
    "pad": PAD,
    "unk": UNK,
    "bos": BOS,
    "eos": EOS,
    "mask": MASK,
    "query": QUERY,
    "answer": ANSWER,
}
HEADS = {"query_heads": 2, "kv_heads": 2}
FULL = {**HEADS, "gated": True, "qk_norm": True}


def model_config(
    *, decoder: dict[str, Any] | None = None, encoder: dict[str, Any] | None = None, **top: Any
) -> ModelConfig:
    """A 2-layer model of width 32 with 4 experts; keyword arguments replace fields."""
    part = {"num_layers": LAYERS, "heads": 4, "ff_dim": 24, "attention": HEADS}
    moe = {"num_experts": 4, "top_k": 2}
    values = {
        "name": "sample",
        "vocab_size": VOCAB,
        "special_tokens": SPECIAL,
        "embed_dim": WIDTH,
        "seq_len": SEQ_LEN,
        "stm_size": SLOTS,
        "encoder": {**part, **(encoder or {})},
        "decoder": {**part, "cross_attention": HEADS, "dense_layer_dim": 40, "moe": moe, **(decoder or {})},
        "memory_attention": {"heads": 4, "attention": HEADS, "gate": {"bias_init": 0.0}},
        **top,
    }
    return ModelConfig.model_validate(values)


VARIANTS: dict[str, ModelConfig] = {
    "moe": model_config(),
    "dense": model_config(decoder={"moe": None}),
    "layer-norm": model_config(norm="layer", decoder={"head_norm": "layer", "stm_norm": False}),
    "head-rms": model_config(decoder={"head_norm": "rms"}),
    "grouped-query": model_config(
        decoder={
            "attention": {"query_heads": 4, "kv_heads": 1},
            "cross_attention": {"query_heads": 4, "kv_heads": 2},
        }
    ),
    "reverse": model_config(
        decoder={
            "attention": {"query_heads": 2, "kv_heads": 4, "output_bias": False},
            "cross_attention": {"query_heads": 1, "kv_heads": 4},
        }
    ),
    "gated-qk-norm": model_config(decoder={"attention": FULL, "cross_attention": FULL}),
    "no-rope": model_config(decoder={"use_rope": False, "gated_ff": False, "activation": "gelu"}),
    "stateless": model_config(
        decoder={"stateless_layers": ["dense", "moe"], "final_stateless_layers": ["moe", "dense"]}
    ),
    "shared-experts": model_config(
        decoder={
            "moe": {"num_experts": 4, "top_k": 1, "num_shared_experts": 3, "weighted_shared_experts": True}
        }
    ),
    "causal-cross": model_config(decoder={"causal_cross": True}),
    "rope-halves": model_config(rope_layout="halves"),
    "rounded-angles": model_config(rope_angle_dtype="activation"),
}


def sample_model(config: ModelConfig, seed: int = 3) -> RxTModel:
    """A model whose parameters are off special values (unit norms, zero biases)."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def sample_stm(lanes: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(LAYERS, lanes, SLOTS, WIDTH, generator=torch.Generator().manual_seed(seed))


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(FIRST_WORD, VOCAB, (count,), generator=generator).tolist()
    return ids


def words_tokenizer(vocab: int = VOCAB) -> Tokenizer:
    """The tokens 11, 12, ... as the words "w11", "w12", ..., between spaces."""
    names = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(FIRST_WORD, vocab))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return words


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token, so that a character can be split over several: ids 11 to 266."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL_TOKENS, *alphabet]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return tokenizer


def prefer(model: RxTModel, token: int, by: float) -> None:
    """Make a token certain (``by`` large) or impossible (``by`` very negative) at every step."""
    with torch.no_grad():
        model.decoder.lm_head.bias[token] = by
