"""The model: sizes of the encoder, the decoder, the short-term memory (STM) and the memory attention.

One file of ``configs/models`` is one :class:`ModelConfig`. Names of the head counts follow sparse query
attention (SQA, https://arxiv.org/abs/2510.01817): ``query_heads`` and ``kv_heads`` are counts, while
``heads`` of the component only fixes the width of a head, ``embed_dim / heads``.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rxt_dist.config.base import Problem, Section, divisors, listed, report

Activation = Literal["silu", "gelu", "relu"]
LayerKind = Literal["dense", "moe"]
MoEBias = Literal["local", "global", "off"]
MemoryVariant = Literal["simple", "self", "interlayer", "self_interlayer", "grouped_self_interlayer"]

INTERLAYER_VARIANTS: tuple[MemoryVariant, ...] = ("interlayer", "self_interlayer", "grouped_self_interlayer")
DEFAULT_STM_SCALE = 0.01


class SpecialTokens(Section):
    """Ids of the tokens that the model itself gives a meaning to."""

    pad: int = Field(ge=0)
    """Id of [PAD]; never fed to the model, kept for exchange with other tools."""
    unk: int = Field(ge=0)
    """Id of [UNK], a symbol outside the vocabulary."""
    bos: int = Field(ge=0)
    """Id of [BOS], the first token of every document and of every query."""
    eos: int = Field(ge=0)
    """Id of [EOS], the last token of every document and of every answer."""
    mask: int = Field(ge=0)
    """Id of [MASK], which replaces masked tokens in the encoder's input."""
    query: int = Field(ge=0)
    """Id of [Q], which starts the query of an interaction."""
    answer: int = Field(ge=0)
    """Id of [A], which starts the answer of an interaction."""


class StmInitConfig(Section):
    """What the STM of a conversation holds before its first write."""

    distribution: Literal["standard", "normal", "uniform", "ones", "zeros"] = "standard"
    """standard: N(0, 1); normal: N(0, std²); uniform: U(0, std); ones; zeros."""
    std: float | None = Field(None, gt=0)
    """Scale of `normal`, upper end of `uniform` (null: 0.01); must be null for the other distributions."""
    shared: bool = False
    """true: one fixed draw for all conversations; false: each conversation gets its own draw."""

    @property
    def scale(self) -> float:
        """``std`` with its default filled in."""
        return DEFAULT_STM_SCALE if self.std is None else self.std

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.std is not None and self.distribution not in ("normal", "uniform"):
            report([Problem("std", f"has no effect with distribution {self.distribution}; valid: null")])
        return self


class AttentionConfig(Section):
    """Head counts and options of one attention; the width of a head is embed_dim / component.heads."""

    query_heads: int = Field(ge=1)
    """Number of query heads, at most `heads` of the component."""
    kv_heads: int = Field(ge=1)
    """Number of key/value heads; divides `heads`, and divides or is divided by query_heads."""
    output_bias: bool = True
    """Whether the output projection has a bias."""
    gated: bool = False
    """Whether heads are multiplied by a learned sigmoid gate of the query input before the output."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm over the head width before rotation."""


class EncoderConfig(Section):
    """The bidirectional encoder."""

    num_layers: int = Field(ge=1)
    """Number of layers L; equal to the decoder's, since layer i writes the STM that decoder layer i reads."""
    heads: int = Field(ge=1)
    """Fixes the width of a head: embed_dim / heads."""
    ff_dim: int = Field(ge=1)
    """Hidden width of the feed-forward."""
    attention: AttentionConfig
    """Self-attention."""
    gated_ff: bool = True
    """Whether the feed-forward is gated: value times activation(gate)."""
    activation: Activation = "silu"
    """Activation of the feed-forward; gelu is the exact one (erf)."""
    use_rope: bool = True
    """Whether queries and keys carry rotary positions."""
    memory_cross_attention: AttentionConfig | None = None
    """Memory cross-attention that published older encoders carry (null: none); never trained, and read
    only with `reads_memory`."""
    stm_norm: bool = False
    """Whether the memory cross-attention has a norm of the STM in front of keys and values."""
    reads_memory: bool = False
    """Whether the encoder reads the STM before its interaction is written, as the oldest published models
    do; such a model can be run but not trained."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.memory_cross_attention is None:
            rule = "has no effect without memory_cross_attention; set it, or use the valid value: false"
            report([Problem(name, rule) for name in ("stm_norm", "reads_memory") if getattr(self, name)])
        return self


class MoEConfig(Section):
    """Mixture of experts: dropless, softmax over all experts, the top_k best renormalised."""

    num_experts: int = Field(ge=1)
    """Number of routed experts E."""
    top_k: int = Field(ge=1)
    """Experts that each token visits, at most num_experts."""
    num_shared_experts: int = Field(0, ge=0)
    """Experts that every token visits besides the routed ones; several are mixed by a softmax gate."""
    shared_expert_dim: int | None = Field(None, ge=1)
    """Hidden width of a shared expert (null: the decoder's ff_dim)."""
    bias: MoEBias = "local"
    """Biases of the experts. local: each expert has its own; global: one output bias for all; off: none."""
    shared_bias: MoEBias = "local"
    """Biases of several shared experts, as `bias`; one shared expert is a plain feed-forward with biases."""
    weighted_shared_experts: bool = False
    """Whether the routed sum is scaled by K/(K+S) and the shared one by S/(K+S), S shared experts."""
    expert_init: Literal["normal", "linear"] = "normal"
    """Initial expert weights. normal: N(0, 0.02²), biases 0; linear: as linear layers, U(±1/sqrt(fan-in))."""
    aux_loss: Literal["reference", "switch", "none"] = "reference"
    """reference: (E/K) times the mean of the chosen experts' probability mass, which flattens routing.
    switch: E times the sum over experts of share of tokens times mean probability, which evens out loads."""
    aux_loss_scale: float = Field(0.01, ge=0)
    """Factor of the auxiliary loss in the total loss."""
    z_loss_weight: float = Field(0.0, ge=0)
    """Factor of the router z-loss in the total loss: the mean square of log sum exp of a router's logits."""
    bias_update_rate: float | None = Field(None, ge=0, lt=1)
    """Balancing without a loss: experts are chosen by probability plus a bias of each, which every step moves
    by this much towards even loads (published: 0.001). 0: biases stay as they were loaded; null: none."""

    @property
    def needs_loads(self) -> bool:
        """Whether training depends on how many tokens each expert got in the step before."""
        return self.aux_loss == "switch" or self.bias_update_rate is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.top_k > self.num_experts:
            valid = f"must be at most num_experts, valid: 1 to {self.num_experts}"
            problems.append(Problem("top_k", f"found {self.top_k}; {valid}"))
        if self.top_k == self.num_experts and self.bias_update_rate is not None:
            unused = f"has no effect when every token visits all {self.num_experts} experts; valid: null"
            problems.append(Problem("bias_update_rate", unused))
        if self.num_shared_experts == 0:
            unused = "has no effect without shared experts; set num_shared_experts, or use the valid value: "
            if self.shared_expert_dim is not None:
                problems.append(Problem("shared_expert_dim", unused + "null"))
            if self.weighted_shared_experts:
                problems.append(Problem("weighted_shared_experts", unused + "false"))
        report(problems)
        return self


class DecoderConfig(Section):
    """The causal decoder, which reads the STM by memory cross-attention in each of its L layers."""

    num_layers: int = Field(ge=1)
    """Number of layers L that read the STM; equal to the encoder's."""
    heads: int = Field(ge=1)
    """Fixes the width of a head: embed_dim / heads."""
    ff_dim: int = Field(ge=1)
    """Hidden width of the feed-forward, or of each routed expert when `moe` is set."""
    attention: AttentionConfig
    """Causal self-attention."""
    cross_attention: AttentionConfig
    """Memory cross-attention: queries from the tokens, keys and values from the STM slots."""
    gated_ff: bool = True
    """Whether the feed-forward (or expert) is gated: value times activation(gate)."""
    activation: Activation = "silu"
    """Activation of the feed-forward; gelu is the exact one (erf)."""
    use_rope: bool = True
    """Whether self-attention and the queries of the memory cross-attention carry rotary positions."""
    stm_norm: bool = True
    """Whether the STM passes a norm before keys and values are made of it."""
    causal_cross: bool = False
    """Whether the token at position t reads the memory rows 0 to t alone, as the oldest published models do;
    false: every token reads all of them."""
    head_norm: Literal["none", "layer", "rms"] = "none"
    """Norm before the LM head."""
    moe: MoEConfig | None = None
    """Mixture of experts in place of the dense feed-forward of the L layers (null: dense)."""
    stateless_layers: list[LayerKind] = Field(default_factory=list)
    """Layers without memory cross-attention before the L layers, in order."""
    final_stateless_layers: list[LayerKind] = Field(default_factory=list)
    """Layers without memory cross-attention after the L layers, in order."""
    dense_layer_dim: int = Field(1536, ge=1)
    """Hidden width of the feed-forward of `dense` stateless layers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        report(
            [
                Problem(name, "has `moe` layers but decoder.moe is null; set moe, or use only: dense")
                for name, kinds in (
                    ("stateless_layers", self.stateless_layers),
                    ("final_stateless_layers", self.final_stateless_layers),
                )
                if "moe" in kinds and self.moe is None
            ]
        )
        return self


class GateConfig(Section):
    """How an update is mixed into the STM: r·new + (1-r)·old for sigmoid, (1+g)·new + (1-g)·old for tanh."""

    type: Literal["off", "static", "elementwise", "linear"] = "linear"
    """off: old + new; static: learned; elementwise: learned times the slot's mean; linear: over all slots."""
    per_slot: bool = True
    """Whether each slot has its own gate value; false: one for all slots."""
    activation: Literal["sigmoid", "tanh"] = "sigmoid"
    """Activation of the gate value."""
    slot_status: Literal["mean", "linear"] = "mean"
    """What a linear gate sees of a slot: the mean of its channels, or a learned projection to one number."""
    init: float = 3.0
    """Initial value of a static or elementwise gate."""
    bias_init: float | None = None
    """Initial bias of a linear gate (null: uniform ±1/sqrt(stm_size)); -3 keeps about 95 % of the old STM."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bias_init is not None and self.type != "linear":
            report([Problem("bias_init", f"only a linear gate has a bias, type is {self.type}; valid: null")])
        return self


class MemoryAttentionConfig(Section):
    """The network that writes an encoded interaction into the STM, one block per layer."""

    variant: MemoryVariant = "self_interlayer"
    """Which STM rows a layer also reads: none (simple), its own (self), the mean of all layers (interlayer),
    both gated (self_interlayer), or both with the mean of its group (grouped_self_interlayer)."""
    heads: int = Field(ge=1)
    """Fixes the width of a head: embed_dim / heads."""
    attention: AttentionConfig
    """Main attention: queries from the STM slots, keys and values from the encoded interaction."""
    interlayer_attention: AttentionConfig | None = None
    """Attention of the STM to the mean over layers (null: as `attention`); interlayer variants only."""
    self_attention: AttentionConfig | None = None
    """Attention of the STM to itself (null: as `attention`); variant `self` only."""
    num_groups: int = Field(1, ge=1)
    """Groups of contiguous layers whose mean is read; variant grouped_self_interlayer only."""
    norm: Literal["classic_rms", "rms", "adaptive", "positional", "layer"] = "classic_rms"
    """Norm of the STM. classic_rms is RMSNorm; rms, adaptive and positional divide by sqrt(RMS) and mix
    the result with their input by a learned gate, as published checkpoints do; layer mixes a LayerNorm."""
    norm_gate_init: float = -2.0
    """Initial gate of every norm but classic_rms, before its sigmoid."""
    norm_per_dim_scale: bool = False
    """Whether the scale of every norm but classic_rms is one per channel instead of one number."""
    norm_decay: float = Field(0.9, ge=0, lt=1)
    """Decay of the running mean square of the adaptive and positional norms."""
    gate: GateConfig = Field(default_factory=GateConfig)
    """The gates that mix an update into the STM."""
    gate_self_attention: bool = False
    """Whether the self-attention step of variant `self` is gated too."""
    gate_residual: bool = True
    """false: the main attention's update is added without a gate although the self-attention's is gated."""
    input_norm: bool = True
    """Whether the encoded interaction passes an RMSNorm before keys and values are made of it."""
    residual: bool = True
    """false: the update replaces the STM; variant `simple` with gate.type off only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        variant = self.variant
        no_effect = f"has no effect in variant {variant}; valid: "
        interlayer = variant in INTERLAYER_VARIANTS
        rules = [
            ("interlayer_attention", self.interlayer_attention is None or interlayer, "null"),
            ("self_attention", self.self_attention is None or variant == "self", "null"),
            ("num_groups", self.num_groups == 1 or variant == "grouped_self_interlayer", "1"),
            ("gate_self_attention", not self.gate_self_attention or variant == "self", "false"),
            ("residual", self.residual or variant == "simple", "true"),
        ]
        problems = [Problem(field, no_effect + valid) for field, fine, valid in rules if not fine]
        if not self.gate_residual and not (self.gate_self_attention and self.gate.type != "off"):
            problems.append(Problem("gate_residual", "found false, but nothing else is gated; valid: true"))
        if not self.residual and self.gate.type != "off":
            valid = "without residual there is nothing to mix, valid: off"
            problems.append(Problem("gate.type", f"found {self.gate.type}; {valid}"))
        report(problems)
        return self


class ModelConfig(Section):
    """One model. `auto` values are filled in from the dataset before the model is built."""

    name: str = Field(min_length=1)
    """Name of the model, for logs and model cards."""
    vocab_size: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """Vocabulary V; auto: the dataset's."""
    card_vocab_size: int | None = Field(None, ge=8)
    """Vocabulary of the published model, used only to count parameters while vocab_size is auto."""
    special_tokens: SpecialTokens | Literal["auto"] = "auto"
    """Ids of the special tokens; auto: the dataset's."""
    embed_dim: int = Field(ge=2)
    """Width of the residual stream D, shared by all components."""
    seq_len: int = Field(ge=8)
    """Longest sequence in tokens: longer documents are split, longer interactions are cut."""
    stm_size: int = Field(ge=1)
    """Number of STM slots S of each layer."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm of encoder and decoder layers."""
    rope_base: float = Field(10000.0, gt=1)
    """Base of the rotary positions' wave lengths."""
    rope_layout: Literal["interleaved", "halves"] = "interleaved"
    """How rotated channel pairs lie in a head where only one side of an attention is rotated (memory
    cross-attention, memory attention): next to each other, or all first members before all second ones."""
    rope_angle_dtype: Literal["float32", "activation"] = "float32"
    """Precision of the rotary angles; activation rounds them to the activations' dtype, as published bf16
    models were trained."""
    embedding_std: float = Field(1.0, gt=0)
    """Standard deviation of the initial token embedding."""
    query_key_init_scale: float = Field(1.0, gt=0)
    """Factor of the initial query and key weights of self-attention in encoder and decoder. Below 1 attention
    starts nearly uniform, and the masked-LM loss leaves its first plateau sooner."""
    stm_init: StmInitConfig = Field(default_factory=StmInitConfig)
    """The STM of a new conversation."""
    encoder: EncoderConfig
    """The encoder."""
    decoder: DecoderConfig
    """The decoder."""
    memory_attention: MemoryAttentionConfig
    """The memory attention."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        report([*self._layer_problems(), *self._head_problems(), *self._token_problems()])
        return self

    def _layer_problems(self) -> list[Problem]:
        problems = []
        layers, groups = self.decoder.num_layers, self.memory_attention.num_groups
        if layers != self.encoder.num_layers:
            valid = f"must equal the encoder's num_layers, valid: {self.encoder.num_layers}"
            problems.append(Problem("decoder.num_layers", f"found {layers}; {valid}"))
        elif layers % groups:
            valid = f"must divide the {layers} layers, valid: {listed(divisors(layers))}"
            problems.append(Problem("memory_attention.num_groups", f"found {groups}; {valid}"))
        return problems

    def _head_problems(self) -> list[Problem]:
        problems = []
        for name, component in (
            ("encoder", self.encoder),
            ("decoder", self.decoder),
            ("memory_attention", self.memory_attention),
        ):
            rotated = isinstance(component, MemoryAttentionConfig) or component.use_rope
            wrong_width = _width_problems(f"{name}.heads", component.heads, self.embed_dim, rotated)
            if wrong_width:
                problems += wrong_width
                continue
            for field in type(component).model_fields:
                attention = getattr(component, field)
                if isinstance(attention, AttentionConfig):
                    found = _attention_problems(attention, component.heads)
                    problems += [problem.under(f"{name}.{field}") for problem in found]
        return problems

    def _token_problems(self) -> list[Problem]:
        if self.special_tokens == "auto":
            return []
        ids: dict[str, int] = self.special_tokens.model_dump()
        problems = []
        for name, token in ids.items():
            if self.vocab_size != "auto" and token >= self.vocab_size:
                valid = f"must be below vocab_size, valid: 0 to {self.vocab_size - 1}"
                problems.append(Problem(f"special_tokens.{name}", f"found {token}; {valid}"))
        if len(set(ids.values())) < len(ids):
            problems.append(Problem("special_tokens", f"found {ids}; every token needs an id of its own"))
        return problems


def _width_problems(field: str, heads: int, embed_dim: int, rotated: bool) -> list[Problem]:
    """``heads`` must divide ``embed_dim``, into an even width where rotary positions pair the channels."""
    valid = [h for h in divisors(embed_dim) if not rotated or embed_dim // h % 2 == 0]
    if heads in valid:
        return []
    rule = f"embed_dim ({embed_dim}) / heads must be {'an even' if rotated else 'a whole'} head width"
    return [Problem(field, f"found {heads}; {rule}, valid: {listed(valid)}")]


def _attention_problems(attention: AttentionConfig, heads: int) -> list[Problem]:
    query, kv = attention.query_heads, attention.kv_heads
    if heads % kv:
        valid_kv = listed(divisors(heads))
        return [Problem("kv_heads", f"found {kv}; must divide heads ({heads}), valid: {valid_kv}")]
    valid = [q for q in range(1, heads + 1) if q % kv == 0 or kv % q == 0]
    if query not in valid:
        rule = f"must be at most heads ({heads}), and divide or be divided by kv_heads ({kv})"
        return [Problem("query_heads", f"found {query}; {rule}, valid: {listed(valid)}")]
    return []
