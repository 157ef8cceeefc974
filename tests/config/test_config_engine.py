"""World sizes, batch arithmetic and the generated DeepSpeed configuration."""

from __future__ import annotations

from typing import Any

import pytest

from rxt_dist.config import (
    RunConfig,
    accumulation_steps,
    check_world_size,
    deepspeed_config,
    load_config,
    micro_units,
    stage_optimizer,
)
from rxt_dist.errors import ConfigError, MeshError

DATA = ["data.text=/data/text", "data.conversations=/data/conversations"]


def tiny(*overrides: str) -> RunConfig:
    return load_config("tiny", [*DATA, *overrides])


def generate(config: RunConfig, dp_size: int = 1, stage: int = 0) -> dict[str, Any]:
    optimizer = stage_optimizer(config, config.stages[stage])
    return deepspeed_config(config, config.stages[stage], dp_size=dp_size, optimizer=optimizer)


class TestWorldSize:
    @pytest.mark.parametrize("world_size", [1, 2, 4, 8])
    def test_divisors_of_the_packs(self, world_size: int) -> None:
        assert check_world_size(tiny(), world_size) == world_size

    @pytest.mark.parametrize("world_size", [0, 3, 16, -1])
    def test_other_sizes_list_the_valid_ones(self, world_size: int) -> None:
        with pytest.raises(MeshError) as caught:
            check_world_size(tiny(), world_size)
        assert str(caught.value) == (
            f"world size: found {world_size} ranks; the data-parallel size must divide batch.packs (8), "
            "valid world sizes: 1, 2, 4, 8"
        )

    def test_micro_packs_count(self) -> None:
        config = tiny("batch.micro_packs=4")
        assert check_world_size(config, 2) == 2
        with pytest.raises(
            MeshError, match=r"batch.packs \(8\) / batch.micro_packs \(4\), valid world sizes: 1, 2$"
        ):
            check_world_size(config, 4)

    @pytest.mark.parametrize(
        ("size", "world", "dp"), [(2, 2, 1), (2, 4, 2), (2, 16, 8), (4, 4, 1), (4, 8, 2)]
    )
    def test_tensors_that_can_be_shared(self, size: int, world: int, dp: int) -> None:
        assert check_world_size(tiny(f"parallel.tensor_size={size}"), world) == dp

    @pytest.mark.parametrize(
        ("size", "world", "own", "message"),
        [
            (3, 4, {}, "the world size (4 ranks), valid: 1, 2, 4"),
            (8, 8, {}, "model.encoder.attention.query_heads (4), valid: 1, 2, 4"),
            (4, 6, {}, "the world size (6 ranks), valid: 1, 2"),
            (
                4,
                4,
                {"model.decoder.attention": "{query_heads: 2, kv_heads: 2}"},
                "model.decoder.attention.query_heads (2), valid: 1, 2",
            ),
            (
                4,
                4,
                {"model.memory_attention.attention": "{query_heads: 1, kv_heads: 2}"},
                "model.memory_attention.attention.kv_heads (2), valid: 1, 2",
            ),
            (2, 2, {"model.encoder.ff_dim": 65}, "model.encoder.ff_dim (65), valid: 1"),
            (2, 2, {"model.decoder.ff_dim": 65}, "model.decoder.ff_dim (65), valid: 1"),
            (
                2,
                2,
                {"model.decoder.moe.shared_expert_dim": 33},
                "model.decoder.moe.shared_expert_dim (33), valid: 1",
            ),
            (
                2,
                2,
                {"model.decoder.stateless_layers": "[dense]", "model.decoder.dense_layer_dim": 7},
                "model.decoder.dense_layer_dim (7), valid: 1",
            ),
        ],
    )
    def test_tensors_that_cannot_be_shared(
        self, size: int, world: int, own: dict[str, Any], message: str
    ) -> None:
        config = tiny(f"parallel.tensor_size={size}", *(f"{key}={value}" for key, value in own.items()))
        with pytest.raises(MeshError) as caught:
            check_world_size(config, world)
        assert str(caught.value) == f"parallel.tensor_size: found {size}; must divide {message}"

    def test_routed_experts_and_unused_layers_are_not_cut(self) -> None:
        check_world_size(
            tiny(
                "parallel.tensor_size=2",
                "model.decoder.ff_dim=65",
                "model.decoder.moe.num_shared_experts=0",
                "model.decoder.dense_layer_dim=7",
            ),
            2,
        )

    def test_packs_are_dealt_to_data_parallel_ranks(self) -> None:
        with pytest.raises(MeshError) as caught:
            check_world_size(tiny("parallel.tensor_size=2"), 32)
        assert str(caught.value) == (
            "world size: found 32 ranks; the data-parallel size must divide batch.packs (8), "
            "valid world sizes: 2, 4, 8, 16"
        )

    @pytest.mark.parametrize(("size", "world"), [(1, 8), (2, 2), (2, 8), (4, 4), (4, 8)])
    def test_experts_that_can_be_dealt_out(self, size: int, world: int) -> None:
        assert check_world_size(tiny(f"parallel.expert_size={size}"), world) == world

    @pytest.mark.parametrize("field", ["expert_size", "tensor_size"])
    @pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
    def test_settings_of_zero_that_spread_experts_need(self, key: str, field: str) -> None:
        block = f"deepspeed={{zero_optimization: {{{key}: false}}}}"
        tiny(block)
        with pytest.raises(ConfigError) as caught:
            tiny(block, f"parallel.{field}=2")
        assert str(caught.value) == (
            f"tiny with --set: deepspeed.zero_optimization.{key}: found false; parallel.{field} above 1 "
            "needs it, valid: true"
        )

    @pytest.mark.parametrize(
        ("size", "world", "valid"), [(3, 4, "1, 2, 4"), (8, 8, "1, 2, 4"), (4, 2, "1, 2")]
    )
    def test_experts_that_cannot_be_dealt_out(self, size: int, world: int, valid: str) -> None:
        with pytest.raises(MeshError) as caught:
            check_world_size(tiny(f"parallel.expert_size={size}"), world)
        assert str(caught.value) == (
            f"parallel.expert_size: found {size}; must divide the world size ({world} ranks) and "
            f"model.decoder.moe.num_experts (4), valid: {valid}"
        )

    def test_a_dense_decoder_has_no_experts_to_share(self) -> None:
        with pytest.raises(MeshError, match=r"model\.decoder\.moe is null, .* valid: 1$"):
            check_world_size(tiny("parallel.expert_size=2", "model.decoder.moe=null"), 2)

    @pytest.mark.parametrize(
        ("micro", "dp", "expected"),
        [("auto", 1, (8, 1)), ("auto", 4, (2, 1)), ("2", 1, (2, 4)), ("2", 4, (2, 1))],
    )
    def test_micro_batches(self, micro: str, dp: int, expected: tuple[int, int]) -> None:
        config = tiny(f"batch.micro_packs={micro}")
        assert (
            micro_units(config, config.stages[0], dp),
            accumulation_steps(config, config.stages[0], dp),
        ) == expected


class TestGeneration:
    def test_our_fields_arrive(self) -> None:
        config = tiny("batch.micro_packs=2", "zero.stage=2", "stages.1.optimizer={lr: 5e-4, clip_norm: 0.5}")
        generated = generate(config, dp_size=2, stage=1)
        assert generated["train_batch_size"] == 8
        assert generated["train_micro_batch_size_per_gpu"] == 2
        assert generated["gradient_accumulation_steps"] == 2
        assert generated["gradient_clipping"] == 0.5
        assert generated["zero_optimization"]["stage"] == 2
        assert generated["zero_optimization"]["reduce_bucket_size"] == 1_000_000
        assert generated["zero_optimization"]["overlap_comm"] is False
        assert generated["optimizer"]["type"] == "AdamW"
        params = generated["optimizer"]["params"]
        assert params["lr"] == 5e-4
        assert params["betas"] == [0.9, 0.99]
        assert params["torch_adam"] is True
        assert "bf16" not in generated

    def test_bf16(self) -> None:
        assert generate(tiny("precision=bf16"))["bf16"] == {"enabled": True, "check_grad_overflow": False}

    @pytest.mark.parametrize(
        ("zero_stage", "micro", "precision", "fp32"),
        [
            (2, "2", "bf16", True),
            (3, "2", "bf16", True),
            (3, "auto", "bf16", False),
            (2, "auto", "bf16", False),
            (1, "2", "bf16", False),
            (2, "2", "fp32", False),
        ],
    )
    def test_gradients_accumulate_in_fp32(
        self, zero_stage: int, micro: str, precision: str, fp32: bool
    ) -> None:
        config = tiny(f"zero.stage={zero_stage}", f"batch.micro_packs={micro}", f"precision={precision}")
        found = generate(config).get("data_types")
        assert found == ({"grad_accum_dtype": "fp32"} if fp32 else None)

    @pytest.mark.parametrize(("zero_stage", "fp32"), [(1, False), (2, True), (3, True)])
    def test_sums_over_ranks_in_fp32_stay_fp32(self, zero_stage: int, fp32: bool) -> None:
        generated = generate(tiny(f"zero.stage={zero_stage}", "zero.reduce_dtype=fp32", "precision=bf16"))
        assert generated["communication_data_type"] == "fp32"
        assert generated.get("data_types") == ({"grad_accum_dtype": "fp32"} if fp32 else None)
        assert "communication_data_type" not in generate(tiny(f"zero.stage={zero_stage}"))

    @pytest.mark.parametrize(("zero_stage", "operation"), [(1, "sum"), (2, "sum"), (3, "mean")])
    def test_gradients_are_summed_where_deepspeed_can(self, zero_stage: int, operation: str) -> None:
        assert generate(tiny(f"zero.stage={zero_stage}"))["gradient_allreduce_op"] == operation

    def test_an_offloaded_optimizer_is_one_kernel_on_the_cpu(self) -> None:
        generated = generate(tiny("zero.offload_optimizer=cpu"))
        assert generated["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
        assert generated["optimizer"]["params"]["fused"] is True
        assert "offload_optimizer" not in generate(tiny())["zero_optimization"]

    def test_fused_is_the_callers_choice(self) -> None:
        config = tiny()
        optimizer = stage_optimizer(config, config.stages[0])
        fused = deepspeed_config(config, config.stages[0], dp_size=1, optimizer=optimizer, fused=True)
        assert fused["optimizer"]["params"]["fused"] is True
        assert generate(config)["optimizer"]["params"]["fused"] is False

    def test_deepspeed_accepts_it(self) -> None:
        deepspeed = pytest.importorskip("deepspeed.runtime.config")
        for precision, stage in (("fp32", 2), ("bf16", 2), ("fp32", 3), ("bf16", 3)):
            options = (f"zero.stage={stage}", "zero.offload_optimizer=cpu", "zero.reduce_dtype=fp32")
            generated = generate(tiny("batch.micro_packs=2", f"precision={precision}", *options))
            parsed = deepspeed.DeepSpeedConfig(generated)
            assert parsed.train_batch_size == 8
            assert parsed.gradient_accumulation_steps == 4
            assert parsed.zero_config.stage == stage
            assert parsed.bfloat16_config.enabled is (precision == "bf16")


class TestOverrides:
    def test_other_keys_are_merged_deeply(self) -> None:
        config = tiny(
            "precision=bf16",
            "deepspeed={bf16: {check_grad_overflow: false}, "
            "zero_optimization: {allgather_bucket_size: 1000}, wall_clock_breakdown: true}",
        )
        generated = generate(config)
        assert generated["bf16"] == {"enabled": True, "check_grad_overflow": False}
        assert generated["zero_optimization"]["allgather_bucket_size"] == 1000
        assert generated["zero_optimization"]["stage"] == 1
        assert generated["wall_clock_breakdown"] is True

    @pytest.mark.parametrize(
        "key",
        [
            "round_robin_gradients",
            "parameter_alignment",
            "zero_quantized_weights",
            "zero_hpz_partition_size",
            "offload_param",
            "zenflow",
            "stage3_module_granularity_threshold",
            "leaf_module",
            "elastic_checkpoint",
            "compute_grad_norm",
        ],
    )
    def test_what_moves_parameters_in_the_shards_is_refused(self, key: str) -> None:
        with pytest.raises(ConfigError) as caught:
            tiny(f"deepspeed={{zero_optimization: {{{key}: true}}}}")
        start = f"tiny with --set: deepspeed.zero_optimization.{key}: cannot be set here; valid: "
        assert str(caught.value).startswith(start + "allgather_bucket_size, ")

    def test_a_typo_in_zero_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"did you mean sub_group_size\?$"):
            tiny("deepspeed={zero_optimization: {sub_group_sizes: 1}}")

    @pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
    def test_gradients_of_cut_weights_are_reduced_in_one_way(self, key: str) -> None:
        block = f"deepspeed={{zero_optimization: {{{key}: true}}}}"
        tiny(block)
        with pytest.raises(ConfigError, match=rf"{key}: cannot be set with zero\.stage 3; remove it$"):
            tiny(block, "zero.stage=3")

    @pytest.mark.parametrize("field", ["expert_size", "tensor_size"])
    def test_weights_are_cut_on_a_plain_mesh_only(self, field: str) -> None:
        with pytest.raises(ConfigError) as caught:
            tiny("zero.stage=3", f"parallel.{field}=2")
        assert str(caught.value) == (
            f"tiny with --set: zero.stage: found 3, but parallel.{field} is 2 and needs whole weights; "
            "valid: 1, 2"
        )

    @pytest.mark.parametrize(
        ("block", "key", "instead"),
        [
            ("{zero_optimization: {stage: 2}}", "zero_optimization.stage", "set zero.stage instead"),
            (
                "{zero_optimization: {overlap_comm: true}}",
                "zero_optimization.overlap_comm",
                "set zero.overlap_comm instead",
            ),
            (
                "{zero_optimization: {offload_optimizer: {device: cpu}}}",
                "zero_optimization.offload_optimizer",
                "set zero.offload_optimizer instead",
            ),
            ("{communication_data_type: fp32}", "communication_data_type", "set zero.reduce_dtype instead"),
            ("{gradient_clipping: 0.5}", "gradient_clipping", "set optimizer.clip_norm instead"),
            ("{train_batch_size: 8}", "train_batch_size", "set batch.packs instead"),
            (
                "{gradient_accumulation_steps: 1}",
                "gradient_accumulation_steps",
                "set batch.micro_packs instead",
            ),
            ("{optimizer: {type: Lamb}}", "optimizer", "set optimizer instead"),
            ("{scheduler: {}}", "scheduler", "set optimizer.schedule instead"),
            ("{bf16: {enabled: true}}", "bf16.enabled", "set precision instead"),
            ("{fp16: {enabled: true}}", "fp16", "set precision instead (fp32 or bf16)"),
            ("{expert_parallel: {}}", "expert_parallel", "set parallel.expert_size instead"),
        ],
    )
    def test_conflicts_name_our_field(self, block: str, key: str, instead: str) -> None:
        with pytest.raises(ConfigError) as caught:
            tiny(f"deepspeed={block}")
        assert str(caught.value) == f"tiny with --set: deepspeed.{key}: cannot be set here; {instead}"

    def test_a_block_must_be_a_mapping(self) -> None:
        with pytest.raises(ConfigError, match=r"deepspeed\.bf16: found true; must be a mapping$"):
            tiny("deepspeed={bf16: true}")

    def test_a_typo_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"did you mean deepspeed\.flops_profiler\?$"):
            tiny("deepspeed={flops_profile: {}}")

    def test_a_loss_that_is_scaled_elsewhere(self) -> None:
        with pytest.raises(ConfigError, match=r"deepspeed\.prescale_gradients: cannot be set here; fixed"):
            tiny("deepspeed.prescale_gradients=true")

    def test_unknown_keys_list_the_valid_ones(self) -> None:
        with pytest.raises(
            ConfigError, match=r"deepspeed\.qqq: not a DeepSpeed key .* valid: bf16, comms_logger"
        ):
            tiny("deepspeed.qqq=1")
