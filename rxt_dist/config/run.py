"""A run: the model, how it is parallelised, its data, its stages and everything around them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rxt_dist.config.base import Problem, Section, divisors, listed, report
from rxt_dist.config.deepspeed import cut_override_problems, expert_override_problems, override_problems
from rxt_dist.config.model import ModelConfig
from rxt_dist.config.stage import DATA_KINDS, DataKind, OptimizerConfig, StageConfig

# A YAML text is a path.
ConfigPath = Annotated[Path, Field(strict=False)]
DatasetUrl = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.", title="URL")]
DatasetLocation = ConfigPath | DatasetUrl


class ParallelConfig(Section):
    """The mesh; the data-parallel size is the world size divided by tensor_size."""

    tensor_size: int = Field(1, ge=1)
    """Ranks that share the heads and hidden channels of every layer and the vocabulary (axis tp)."""
    expert_size: int = Field(1, ge=1)
    """Ranks that share the experts of a layer (axis ep)."""
    sequence_parallel: bool = False
    """Whether the ranks that share tensors also divide the tokens between products (norms, residuals,
    routers); needs a tensor_size above 1."""

    @model_validator(mode="after")
    def _check_sequence(self) -> Self:
        if self.sequence_parallel and self.tensor_size == 1:
            found = "found true, but tensor_size is 1; valid: false, or a larger tensor_size"
            report([Problem("sequence_parallel", found)])
        return self


class ZeroConfig(Section):
    """Sharding of optimizer state, gradients and weights over the data-parallel ranks (DeepSpeed ZeRO)."""

    stage: int = Field(1, ge=1, le=3)
    """1: optimizer state is sharded; 2: gradients too; 3: weights too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where optimizer state is kept and updated; none: on the device of the weights; cpu: in host memory."""
    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """In what gradients are summed over ranks; auto: the precision of the run."""
    reduce_bucket_size: int = Field(500_000_000, ge=1)
    """Gradient elements that are reduced together; larger is fewer messages and more memory."""
    overlap_comm: bool = True
    """Whether gradients are reduced while the backward pass still runs."""


class MixedDataset(Section):
    """One of several datasets that a stage reads."""

    path: DatasetLocation
    """Dataset folder, or URL of one."""
    weight: int = Field(1, ge=1, le=1000)
    """Its share of the packs, in the memory stages of the conversations, is `weight` divided by the sum over
    the list."""


Datasets = DatasetLocation | Annotated[list[MixedDataset], Field(min_length=1)] | None


class DataConfig(Section):
    """Datasets made by `rxt-data`: folders, a relative path is relative to the current one, or their URLs."""

    text: Datasets = None
    """Dataset of documents for stage joint_lm, or a list of them as {path, weight}."""
    conversations: Datasets = None
    """Dataset of conversations for the stages after joint_lm, or a list of datasets that are mixed."""
    cache_dir: ConfigPath | None = None
    """Folder on a local disk for the shards that are fetched of URLs, which need it, and for joined indices,
    with which a run over very many shards starts faster; the processes of a host share it."""
    cache_bytes: int | None = Field(None, ge=1)
    """Most bytes of shards in `cache_dir`: those not used for longest are removed; null: no limit."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What a damaged block does; error: it ends the run; skip: its documents are left out, on all ranks."""
    max_corrupt_blocks: int = Field(16, ge=1)
    """Most damaged blocks that are left out in a run; one more ends it."""
    accept_changed: bool = False
    """Whether --resume goes on with another dataset than the run was started with, at its next epoch."""

    def datasets(self, kind: DataKind) -> list[MixedDataset]:
        """The datasets of ``kind``, also if it is a single one; empty if it is not set."""
        value: str | Path | list[MixedDataset] | None = getattr(self, kind)
        if value is None:
            return []
        return value if isinstance(value, list) else [MixedDataset(path=value)]

    @model_validator(mode="after")
    def _check_datasets(self) -> Self:
        problems, urls = [], []
        for kind in DATA_KINDS:
            paths = [dataset.path for dataset in self.datasets(kind)]
            for number, path in enumerate(paths):
                if path in paths[:number]:
                    valid = "it is in the list already; give it a larger weight instead"
                    problems.append(Problem(f"{kind}.{number}.path", f"found {path}; {valid}"))
            urls += [path for path in paths if isinstance(path, str)]
        if urls and self.cache_dir is None:
            valid = "set it to a folder on a local disk, for the shards that are fetched"
            problems.append(Problem("cache_dir", f"not set, but {urls[0]} is a URL; {valid}"))
        if self.cache_bytes is not None and self.cache_dir is None:
            problems.append(
                Problem("cache_bytes", f"found {self.cache_bytes} without cache_dir; set that too")
            )
        report(problems)
        return self


class BatchConfig(Section):
    """What one optimizer step trains on; the same on every mesh."""

    packs: int = Field(ge=1)
    """Packs of every optimizer step, over all ranks."""
    pack_tokens: int = Field(ge=8)
    """Most tokens of a pack; at least model.seq_len."""
    micro_packs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Packs that a rank processes at once, the rest is accumulated; auto: all packs of the rank."""
    lanes: int | None = Field(None, ge=1)
    """Lanes of every optimizer step of the memory stages, over all ranks; each holds one conversation."""
    micro_lanes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Lanes that a rank processes at once, the rest is accumulated; auto: all lanes of the rank."""
    window: int = Field(1, ge=1)
    """Consecutive interactions of a lane that one optimizer step trains on, with gradients through all."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints (null: none besides the one at the end of every stage)."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""


class PrometheusConfig(Section):
    """The metrics exporter of each rank."""

    enabled: bool = True
    """Whether metrics are served over HTTP."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to bind; 0.0.0.0 opens the metrics to the network."""
    base_port: int = Field(9400, ge=1024, le=65000)
    """Port of local rank 0; local rank r serves on base_port + r."""


class MetricsConfig(Section):
    """Logging and monitoring."""

    log_every_steps: int = Field(1, ge=1)
    """Optimizer steps between log lines."""
    prometheus: PrometheusConfig = Field(default_factory=PrometheusConfig)
    """The metrics exporter."""


class EvaluationConfig(Section):
    """Validation at the end of every stage."""

    max_packs: int | None = Field(None, ge=1)
    """Most packs of the validation split that the text stages evaluate (null: the whole split)."""
    max_conversations: int | None = Field(None, ge=1)
    """Most conversations of the validation split that the memory stages evaluate (null: the whole split)."""
    samples: int = Field(3, ge=0)
    """Continuations that are generated."""
    sample_tokens: int = Field(48, ge=1)
    """Most tokens of a generated continuation."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the continuations; 0: always the most probable token."""


class RuntimeConfig(Section):
    """Where the run writes, and how it executes."""

    run_dir: ConfigPath
    """Folder of the run's checkpoints, logs and resolved configuration."""
    attention_backend: Literal["auto", "triton", "flash", "varlen", "sdpa"] = "auto"
    """Attention kernel; auto: the fastest that the device and the precision allow. triton: our own for groups
    of few keys (256 with heads of 16 numbers, 128 with heads of 32), the next here for longer ones."""
    compile: bool = False
    """Compile the layers and the loss with torch.compile: faster steps after a start of about a minute, which
    a later start on the same machine finds in the compiler's cache (TORCHINDUCTOR_CACHE_DIR). Needs bf16."""
    recompute: Literal["none", "interaction"] = "none"
    """What the backward pass of the memory stages computes again to save memory; interaction: everything but
    the STM between the interactions of a window."""
    peer_copies: bool = False
    """Let copy engines bring tokens to experts and back where the GPUs of an expert group are in one host and
    reach each other's memory; false, and elsewhere: NCCL."""
    collective_timeout_seconds: int = Field(1800, ge=1)
    """Seconds after which a hung collective operation ends the run."""
    data_prefetch_steps: int = Field(2, ge=0)
    """Optimizer steps that a thread prepares ahead; 0: no thread, each is prepared when it is needed."""


class RunConfig(Section):
    """Everything a run depends on."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of all randomness: initialisation, data order, masking, noise."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of parameters and activations; bf16 keeps fp32 master weights in the optimizer."""
    model: ModelConfig
    """The model; in a file also the name of a model file."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """The mesh."""
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    """Sharding of optimizer state, gradients and weights."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The datasets."""
    batch: BatchConfig
    """What one optimizer step trains on."""
    stages: list[StageConfig] = Field(min_length=1)
    """The training stages, in order."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer and schedule of all stages."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    """Logging and monitoring."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Validation."""
    runtime: RuntimeConfig
    """Where the run writes, and how it executes."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed settings merged into the generated ones; keys that our own fields set are refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        report([*self._batch_problems(), *self._stage_problems(), *self._engine_problems()])
        return self

    def _batch_problems(self) -> list[Problem]:
        problems = []
        batch = self.batch
        if batch.pack_tokens < self.model.seq_len:
            valid = f"must hold the longest sequence, valid: model.seq_len ({self.model.seq_len}) or more"
            problems.append(Problem("batch.pack_tokens", f"found {batch.pack_tokens}; {valid}"))
        if batch.micro_packs != "auto" and batch.packs % batch.micro_packs:
            valid = f"must divide batch.packs ({batch.packs}), valid: auto, {listed(divisors(batch.packs))}"
            problems.append(Problem("batch.micro_packs", f"found {batch.micro_packs}; {valid}"))
        users = [f"{i} ({stage.name})" for i, stage in enumerate(self.stages) if stage.uses_lanes]
        if batch.lanes is None:
            if users:
                valid = f"stage {users[0]} needs it; valid: a number of lanes that the ranks divide, e.g. 32"
                problems.append(Problem("batch.lanes", f"not set, but {valid}"))
        elif batch.micro_lanes != "auto" and batch.lanes % batch.micro_lanes:
            valid = f"must divide batch.lanes ({batch.lanes}), valid: auto, {listed(divisors(batch.lanes))}"
            problems.append(Problem("batch.micro_lanes", f"found {batch.micro_lanes}; {valid}"))
        return problems

    def _stage_problems(self) -> list[Problem]:
        problems = []
        norm = self.model.memory_attention.norm
        if norm in ("adaptive", "positional") and any(stage.uses_lanes for stage in self.stages):
            valid = "its running means differ between ranks, so it can only be imported and run, not trained"
            found = f"found {norm}; {valid}; valid: classic_rms, rms, layer"
            problems.append(Problem("model.memory_attention.norm", found))
        if self.model.encoder.reads_memory:
            found = "found true; encoders that read the memory can be run but not trained; valid: false"
            problems.append(Problem("model.encoder.reads_memory", found))
        if self.model.decoder.causal_cross and any(stage.name == "context_sft" for stage in self.stages):
            valid = "its rows are not counted by position in stage context_sft; valid: false"
            problems.append(Problem("model.decoder.causal_cross", f"found true; {valid}"))
        for index, stage in enumerate(self.stages):
            warmup = stage_optimizer(self, stage).warmup_steps
            if warmup > stage.steps:
                own = stage.optimizer.warmup_steps is not None
                field = f"stages.{index}.optimizer.warmup_steps" if own else "optimizer.warmup_steps"
                rule = f"must not exceed the steps of stage {index} ({stage.name})"
                problems.append(Problem(field, f"found {warmup}; {rule}, valid: 0 to {stage.steps}"))
        return problems

    def _engine_problems(self) -> list[Problem]:
        problems = [problem.under("deepspeed") for problem in override_problems(self.deepspeed)]
        if self.zero.stage == 3:
            problems += [problem.under("deepspeed") for problem in cut_override_problems(self.deepspeed)]
            for field in ("expert_size", "tensor_size"):
                if (size := getattr(self.parallel, field)) > 1:
                    valid = f"parallel.{field} is {size} and needs whole weights; valid: 1, 2"
                    problems.append(Problem("zero.stage", f"found 3, but {valid}"))
        sizes = self.parallel.model_dump()
        spread = next((name for name in ("expert_size", "tensor_size") if sizes[name] > 1), None)
        if spread is not None and self.model.decoder.moe is not None:
            found = expert_override_problems(self.deepspeed, spread)
            problems += [problem.under("deepspeed") for problem in found]
        backend = self.runtime.attention_backend
        if backend in ("triton", "flash", "varlen") and self.precision != "bf16":
            valid = f"needs precision bf16, precision is {self.precision}; valid: auto, sdpa"
            problems.append(Problem("runtime.attention_backend", f"found {backend}; {valid}"))
        if self.runtime.compile and self.precision != "bf16":
            message = f"found true; needs precision bf16, precision is {self.precision}; valid: false"
            problems.append(Problem("runtime.compile", message))
        return problems


def stage_window(config: RunConfig, stage: StageConfig) -> int:
    """Interactions of a lane in one optimizer step of ``stage``, which has lanes."""
    return config.batch.window if stage.window is None else stage.window


def stage_optimizer(config: RunConfig, stage: StageConfig) -> OptimizerConfig:
    """The optimizer settings of ``stage``: the run's, overridden field by field."""
    overrides = stage.optimizer.model_dump(exclude_none=True)
    return config.optimizer.model_copy(update=overrides)
