"""A training stage: what it trains on, its objective's options, and its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from rxt_dist.config.base import Problem, Section, listed, report

# A YAML list is a pair.
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
]
StageName = Literal["joint_lm", "interaction_sft", "context_sft", "memory_attention", "smat"]
Component = Literal["encoder", "decoder", "memory_attention"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
DataKind = Literal["text", "conversations"]
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)

STAGE_DATA: dict[StageName, DataKind] = {
    "joint_lm": "text",
    "interaction_sft": "conversations",
    "context_sft": "conversations",
    "memory_attention": "conversations",
    "smat": "conversations",
}
"""The dataset that each stage trains on, as a field of :class:`rxt_dist.config.run.DataConfig`."""

LANE_STAGES: tuple[StageName, ...] = ("context_sft", "memory_attention", "smat")
"""Stages that train on windows of conversation lanes."""
ANSWER_STAGES: tuple[StageName, ...] = ("context_sft", "smat")
"""Those that answer an interaction while they read what came before it."""

_STAGE_FIELDS: dict[str, tuple[StageName, ...]] = {
    "components": ("joint_lm", "interaction_sft"),
    "masking_probability": ("joint_lm", "interaction_sft"),
    "encoder_loss_scale": ("joint_lm", "interaction_sft"),
    "decoder_loss_scale": ("joint_lm", "interaction_sft"),
    "slot_dropout": ("joint_lm", "interaction_sft"),
    "noise_level": ("joint_lm", "interaction_sft", "memory_attention"),
    "label_noise_level": ("memory_attention",),
    "label_weight_floor": ("memory_attention",),
    "label_weight_jitter": ("memory_attention",),
    "stm_difference_scale": ("memory_attention",),
    "unused_slots": ("memory_attention",),
    "frozen": ("smat",),
    "unfreeze": ("smat",),
    "system_prompts": ANSWER_STAGES,
    "window": LANE_STAGES,
}
"""Fields of a stage that only some stages have; elsewhere they must keep their default."""


class OptimizerConfig(Section):
    """AdamW and its schedule; a stage may override any field."""

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay of the running mean and of the running mean square of the gradient."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0, at most the steps of the stage."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine to min_lr_ratio · lr at the stage's last step, or constant."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of lr."""
    clip_norm: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0: no clipping."""


class OptimizerOverrides(Section):
    """Fields of the run's `optimizer` that differ in one stage; null: as in the run."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate."""
    betas: Betas | None = None
    """Decay of the running mean and of the running mean square of the gradient."""
    eps: float | None = Field(None, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float | None = Field(None, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises from 0, at most the steps of the stage."""
    schedule: Literal["cosine", "constant"] | None = None
    """Learning rate after the warm-up."""
    min_lr_ratio: float | None = Field(None, ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of lr."""
    clip_norm: float | None = Field(None, ge=0)
    """Global gradient norm above which gradients are scaled down; 0: no clipping."""


class UnfreezeConfig(Section):
    """How long components are frozen at the beginning of a stage; null: not at all."""

    encoder: int | None = Field(None, ge=1)
    """Steps of the stage in which the encoder keeps its weights; after them it trains."""
    memory_attention: int | None = Field(None, ge=1)
    """Steps of the stage in which memory attention keeps its weights; after them it trains."""
    decoder: int | None = Field(None, ge=1)
    """Steps of the stage in which the decoder keeps its weights; after them it trains."""

    def steps(self) -> dict[Component, int]:
        """Those that are set, by component: its first step in training (from 0)."""
        found = {name: getattr(self, name) for name in COMPONENTS}
        return {name: step for name, step in found.items() if step is not None}


class StageConfig(Section):
    """One training objective; stages run in the order of the list, each from the previous one's result."""

    name: StageName
    """joint_lm: masked-LM and autoregressive loss on text; interaction_sft: both on single interactions;
    context_sft: answers that read the encodings of earlier interactions; memory_attention: self-supervised
    memory update; smat: supervised memory-aware training."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    components: Literal["joint", "encoder", "decoder"] = "joint"
    """What is trained: encoder (with the MLM head) and decoder together, or one of them alone."""
    optimizer: OptimizerOverrides = Field(default_factory=OptimizerOverrides)
    """Fields of the run's `optimizer` that differ in this stage."""
    masking_probability: float = Field(0.15, gt=0, lt=1)
    """Probability that a token of the encoder's input is replaced by [MASK] and predicted."""
    encoder_loss_scale: float = Field(1.0, ge=0)
    """Factor of the masked-LM loss."""
    decoder_loss_scale: float = Field(1.0, ge=0)
    """Factor of the autoregressive loss."""
    noise_level: float = Field(0.0, ge=0)
    """Standard deviation of the noise added to the encoder's layers before they are read as memory, or
    before memory attention writes them."""
    slot_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that the decoder reads zeros in place of a token's row of an encoder layer."""
    label_noise_level: float = Field(0.0, ge=0)
    """Standard deviation of the noise added to the label of a memory update."""
    label_weight_floor: float = Field(0.05, ge=0, le=1)
    """Least weight of the new data in that label; it falls by 0.05 with every interaction."""
    label_weight_jitter: float = Field(0.0, ge=0, le=1)
    """Largest random shift of that weight, one draw for every interaction (published recipe: 0.15)."""
    stm_difference_scale: float = Field(0.0, ge=0)
    """Factor of the loss term that keeps an update small: sqrt(t+1) times its mean square."""
    unused_slots: Literal["ignored", "kept", "reference"] = "ignored"
    """STM slots beyond the end of an interaction in the loss: ignored: they have no label; kept: their label
    is the memory before; reference: also the encoding of [PAD] tokens, as the published recipe has it."""
    frozen: list[Component] = Field(default_factory=list)
    """Components that keep their weights in this stage."""
    unfreeze: UnfreezeConfig = Field(default_factory=UnfreezeConfig)
    """Components that keep their weights at the beginning of the stage, and train later."""
    system_prompts: bool = False
    """Whether the system prompt of a conversation that has one is written into its STM at the beginning, or
    is the first that context_sft reads."""
    window: int | None = Field(None, ge=1)
    """Consecutive interactions of a lane that one optimizer step of the stage trains on (null:
    batch.window)."""

    @property
    def uses_lanes(self) -> bool:
        """Whether the stage trains on windows of conversation lanes rather than on packs."""
        return self.name in LANE_STAGES

    @model_validator(mode="after")
    def _check_applicable(self) -> Self:
        problems = []
        for field, stages in _STAGE_FIELDS.items():
            default = type(self).model_fields[field].get_default(call_default_factory=True)
            value = getattr(self, field)
            if self.name not in stages and value != default:
                found = value.model_dump(exclude_none=True) if isinstance(value, Section) else value
                valid = f"it has no effect in stage {self.name}, only in {listed(stages)}; remove it"
                problems.append(Problem(field, f"found {found!r}; {valid}"))
        report(problems)
        return self

    @model_validator(mode="after")
    def _check_frozen(self) -> Self:
        problems = []
        later = self.unfreeze.steps()
        for component, step in later.items():
            field = f"unfreeze.{component}"
            if component in self.frozen:
                problems.append(Problem(field, f"found {step}, but `frozen` lists {component}; remove one"))
            elif step >= self.steps:
                valid = f"valid: 1 to {self.steps - 1} (steps is {self.steps}), or list it under `frozen`"
                problems.append(Problem(field, f"found {step}, so that it would never train; {valid}"))
        if len({*self.frozen, *later}) == len(COMPONENTS):
            field = "unfreeze" if later else "frozen"
            problems.append(Problem(field, "all components are frozen at the beginning; leave one out"))
        report(problems)
        return self

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        encoder, decoder = self.encoder_loss_scale > 0, self.decoder_loss_scale > 0
        if self.components == "joint" and not (encoder or decoder):
            rule = "found 0, as decoder_loss_scale, so that nothing would train; set one of them above 0"
            report([Problem("encoder_loss_scale", rule)])
        for component, scaled in (("encoder", encoder), ("decoder", decoder)):
            if self.components == component and not scaled:
                field = f"{component}_loss_scale"
                report([Problem(field, f"found 0 with components {component}; valid: above 0")])
        return self
