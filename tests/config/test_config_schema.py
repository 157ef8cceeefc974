"""The schema: every field documented, values typed, contradictions refused where they are made."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from rxt_dist.config import (
    MoEConfig,
    OptimizerConfig,
    OptimizerOverrides,
    RunConfig,
    load_config,
    stage_optimizer,
)
from rxt_dist.config.problems import explain

DATA = ["data.text=/data/text", "data.conversations=/data/conversations"]


def sections(annotation: Any, found: dict[type[BaseModel], None]) -> dict[type[BaseModel], None]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation not in found:
            found[annotation] = None
            for field in annotation.model_fields.values():
                sections(field.annotation, found)
    elif get_origin(annotation) in (Union, types.UnionType, list, tuple) or get_args(annotation):
        for argument in get_args(annotation):
            sections(argument, found)
    return found


SECTIONS = list(sections(RunConfig, {}))


def problems_of(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(data)
    return [str(problem) for problem in explain(caught.value, RunConfig)]


@pytest.fixture
def tiny() -> dict[str, Any]:
    return load_config("tiny", DATA).model_dump()


def test_the_walk_finds_nested_sections() -> None:
    names = {section.__name__ for section in SECTIONS}
    assert {
        "RunConfig",
        "GateConfig",
        "SpecialTokens",
        "MoEConfig",
        "OptimizerOverrides",
        "PrometheusConfig",
    } <= names


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_field_has_a_description(section: type[BaseModel]) -> None:
    missing = [name for name, field in section.model_fields.items() if not (field.description or "").strip()]
    assert not missing
    assert (section.__doc__ or "").strip()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_section_is_frozen_and_refuses_unknown_keys(section: type[BaseModel]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"] is True


def test_a_config_cannot_be_changed() -> None:
    config = load_config("tiny", DATA)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_overrides_cover_exactly_the_optimizer() -> None:
    assert set(OptimizerOverrides.model_fields) == set(OptimizerConfig.model_fields)


def test_stage_optimizer_overrides_field_by_field() -> None:
    config = load_config("tiny", [*DATA, "stages.1.optimizer={lr: 5e-4, betas: [0.8, 0.9], warmup_steps: 0}"])
    first, second, *_ = (stage_optimizer(config, stage) for stage in config.stages)
    assert first == config.optimizer
    assert (second.lr, second.betas, second.warmup_steps) == (5e-4, (0.8, 0.9), 0)
    assert second.weight_decay == config.optimizer.weight_decay


def test_stm_scale_default() -> None:
    assert load_config("alpha", DATA).model.stm_init.scale == 0.01
    assert load_config("micro", DATA).model.stm_init.scale == 0.02


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", True, "seed: found true; must be an integer"),
        ("seed", "3", 'seed: found "3"; must be an integer'),
        ("precision", "fp16", "precision: found \"fp16\"; must be 'fp32' or 'bf16'"),
        ("optimizer.lr", 0, "optimizer.lr: found 0; must be greater than 0"),
        ("optimizer.lr", float("nan"), "optimizer.lr: found NaN; must be a finite number"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas.1: found 1.0; must be less than 1"),
        (
            "optimizer.betas",
            [0.9, 0.9, 0.9],
            "optimizer.betas: found [0.9, 0.9, 0.9]; must have at most 2 items",
        ),
        ("zero.stage", 4, "zero.stage: found 4; must be less than or equal to 3"),
        ("zero.stage", 0, "zero.stage: found 0; must be greater than or equal to 1"),
        ("batch.micro_packs", "all", "batch.micro_packs: found \"all\"; must be an integer or 'auto'"),
        ("model.vocab_size", 3, "model.vocab_size: found 3; must be greater than or equal to 8 or 'auto'"),
        ("model.seq_len", 7, "model.seq_len: found 7; must be greater than or equal to 8"),
        ("model.encoder", 5, "model.encoder: found 5; must be a mapping of its fields"),
        ("stages", [], "stages: found []; must have at least 1 items"),
        ("stages.0.steps", 0, "stages.0.steps: found 0; must be greater than or equal to 1"),
        ("stages.0.masking_probability", 1.0, "stages.0.masking_probability: found 1.0; must be less than 1"),
        ("data.text", 3, "data.text: found 3; must be a path (text) or a list"),
    ],
)
def test_bad_values(tiny: dict[str, Any], path: str, value: Any, expected: str) -> None:
    set_value(tiny, path, value)
    assert problems_of(tiny) == [expected]


def set_value(data: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        data = data[int(key)] if isinstance(data, list) else data[key]
    data[int(last) if isinstance(data, list) else last] = value


def test_unknown_keys_name_the_nearest(tiny: dict[str, Any]) -> None:
    tiny["model"]["embed_dims"] = 3
    tiny["model"]["special_tokens"] = {
        "pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4, "query": 5, "answr": 6
    }  # fmt: skip
    tiny["stages"][1]["step"] = 3
    tiny["precison"] = "fp32"
    tiny["zzzz"] = 1
    problems = problems_of(tiny)
    assert "model.embed_dims: unknown key; did you mean model.embed_dim?" in problems
    assert "model.special_tokens.answr: unknown key; did you mean model.special_tokens.answer?" in problems
    assert "stages.1.step: unknown key; did you mean stages.1.steps?" in problems
    assert "precison: unknown key; did you mean precision?" in problems
    assert any(p.startswith("zzzz: unknown key; valid: seed, precision, model") for p in problems)
    assert any(
        p.startswith("model.special_tokens.answer: missing; it is required: Id of [A]") for p in problems
    )
    assert len(problems) == 6


def test_a_missing_section_is_named(tiny: dict[str, Any]) -> None:
    del tiny["batch"], tiny["runtime"]["run_dir"]
    problems = problems_of(tiny)
    assert [p.partition(":")[0] for p in problems] == ["batch", "runtime.run_dir"]
    assert all("missing; it is required: " in p for p in problems)


EVEN_WIDTH = "embed_dim (64) / heads must be an even head width, valid: 1, 2, 4, 8, 16, 32"
GQA_OF_TWO = "must be at most heads (4), and divide or be divided by kv_heads (2), valid: 1, 2, 4"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model.decoder.num_layers", 3, "found 3; must equal the encoder's num_layers, valid: 2"),
        ("model.encoder.heads", 5, f"found 5; {EVEN_WIDTH}"),
        ("model.memory_attention.heads", 64, f"found 64; {EVEN_WIDTH}"),
        ("model.decoder.attention.kv_heads", 3, "found 3; must divide heads (4), valid: 1, 2, 4"),
        ("model.decoder.attention.query_heads", 3, f"found 3; {GQA_OF_TWO}"),
        ("model.encoder.attention.query_heads", 8, f"found 8; {GQA_OF_TWO}"),
        (
            "model.memory_attention.interlayer_attention.kv_heads",
            8,
            "found 8; must divide heads (4), valid: 1, 2, 4",
        ),
        ("model.decoder.moe.top_k", 5, "found 5; must be at most num_experts, valid: 1 to 4"),
        (
            "model.memory_attention.num_groups",
            2,
            "has no effect in variant self_interlayer; valid: 1",
        ),
        (
            "model.memory_attention.gate_self_attention",
            True,
            "has no effect in variant self_interlayer; valid: false",
        ),
        (
            "batch.pack_tokens",
            63,
            "found 63; must hold the longest sequence, valid: model.seq_len (64) or more",
        ),
        ("batch.micro_packs", 3, "found 3; must divide batch.packs (8), valid: auto, 1, 2, 4, 8"),
        (
            "stages.1.optimizer.warmup_steps",
            11,
            "found 11; must not exceed the steps of stage 1 (interaction_sft), valid: 0 to 10",
        ),
        (
            "runtime.attention_backend",
            "varlen",
            "found varlen; needs precision bf16, precision is fp32; valid: auto, sdpa",
        ),
        ("runtime.compile", True, "found true; needs precision bf16, precision is fp32; valid: false"),
        (
            "parallel.sequence_parallel",
            True,
            "found true, but tensor_size is 1; valid: false, or a larger tensor_size",
        ),
    ],
)
def test_fields_that_contradict_each_other(
    tiny: dict[str, Any], field: str, value: Any, expected: str
) -> None:
    set_value(tiny, field, value)
    assert problems_of(tiny) == [f"{field}: {expected}"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_not_compiled(tiny: dict[str, Any], stage: int) -> None:
    set_value(tiny, "zero.stage", stage)
    set_value(tiny, "precision", "bf16")
    set_value(tiny, "runtime.compile", True)
    RunConfig.model_validate(tiny)
    set_value(tiny, "precision", "fp32")
    need = "precision bf16, precision is fp32"
    assert problems_of(tiny) == [f"runtime.compile: found true; needs {need}; valid: false"]


@pytest.mark.parametrize(
    ("path", "value", "field", "expected"),
    [
        ("stm_init.distribution", "zeros", "stm_init.std", "distribution zeros; valid: null"),
        (
            "memory_attention.gate.type",
            "static",
            "memory_attention.gate.bias_init",
            "type is static; valid: null",
        ),
        (
            "memory_attention.variant",
            "simple",
            "memory_attention.interlayer_attention",
            "has no effect in variant simple; valid: null",
        ),
        (
            "memory_attention.self_attention",
            {"query_heads": 4, "kv_heads": 4},
            "memory_attention.self_attention",
            "has no effect in variant self_interlayer; valid: null",
        ),
    ],
)
def test_options_without_effect(
    tiny: dict[str, Any], path: str, value: Any, field: str, expected: str
) -> None:
    set_value(tiny["model"], path, value)
    (problem,) = problems_of(tiny)
    assert problem.startswith(f"model.{field}: ")
    assert problem.endswith(expected)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.decoder.moe.num_shared_experts", 0),
        ("model.decoder.final_stateless_layers", ["moe", "dense"]),
        ("model.decoder.attention.query_heads", 1),
        ("model.decoder.cross_attention.query_heads", 2),
        ("model.encoder.memory_cross_attention", {"query_heads": 4, "kv_heads": 2}),
        ("stages.0.decoder_loss_scale", 0.0),
        ("batch.pack_tokens", 64),
        ("optimizer.warmup_steps", 10),
    ],
)
def test_values_at_the_edge_are_valid(tiny: dict[str, Any], path: str, value: Any) -> None:
    set_value(tiny, path, value)
    RunConfig.model_validate(tiny)


def test_shared_expert_options_need_shared_experts(tiny: dict[str, Any]) -> None:
    tiny["model"]["decoder"]["moe"] |= {
        "num_shared_experts": 0,
        "shared_expert_dim": 8,
        "weighted_shared_experts": True,
    }
    problems = problems_of(tiny)
    assert [p.partition(": ")[0] for p in problems] == [
        "model.decoder.moe.shared_expert_dim",
        "model.decoder.moe.weighted_shared_experts",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aux_loss": "swich"}, r"aux_loss: found .swich.; must be .reference., .switch. or .none.$"),
        ({"z_loss_weight": -0.1}, r"z_loss_weight: found -0\.1"),
        ({"z_loss_weight": None}, r"z_loss_weight: found"),
        ({"bias_update_rate": -0.001}, r"bias_update_rate: found -0\.001"),
        ({"bias_update_rate": 1.0}, r"bias_update_rate: found 1"),
        ({"bias_update_rate": "fast"}, r"bias_update_rate: found .fast."),
        (
            {"top_k": 4, "bias_update_rate": 0.001},
            r"bias_update_rate: has no effect when every token visits all 4 experts; valid: null",
        ),
    ],
)
def test_mistakes_in_the_balance_of_experts(
    tiny: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    tiny["model"]["decoder"]["moe"] |= changes
    (problem,) = problems_of(tiny)
    assert re.search(r"^model\.decoder\.moe\." + message, problem), problem


def test_balance_of_experts_is_off_by_default() -> None:
    moe = MoEConfig(num_experts=4, top_k=2)
    assert (moe.aux_loss, moe.z_loss_weight, moe.bias_update_rate) == ("reference", 0.0, None)
    assert not moe.needs_loads
    assert MoEConfig(num_experts=4, top_k=2, aux_loss="switch").needs_loads
    assert MoEConfig(num_experts=4, top_k=2, bias_update_rate=0.0).needs_loads


def test_moe_layers_need_moe(tiny: dict[str, Any]) -> None:
    tiny["model"]["decoder"] |= {"moe": None, "stateless_layers": ["dense", "moe"]}
    (problem,) = problems_of(tiny)
    assert problem.startswith("model.decoder.stateless_layers: has `moe` layers but decoder.moe is null;")


def test_odd_head_width_is_fine_without_rotation(tiny: dict[str, Any]) -> None:
    tiny["model"]["encoder"] |= {"heads": 64, "use_rope": False}
    RunConfig.model_validate(tiny)


def test_groups_divide_the_layers(tiny: dict[str, Any]) -> None:
    tiny["model"]["memory_attention"] |= {"variant": "grouped_self_interlayer", "num_groups": 3}
    assert problems_of(tiny) == [
        "model.memory_attention.num_groups: found 3; must divide the 2 layers, valid: 1, 2"
    ]


def test_no_residual_needs_the_simple_variant_without_gate(tiny: dict[str, Any]) -> None:
    memory = tiny["model"]["memory_attention"]
    memory |= {"variant": "simple", "interlayer_attention": None, "residual": False}
    assert len(problems_of(tiny)) == 1
    assert problems_of(tiny)[0].startswith("model.memory_attention.gate.type: found linear;")
    memory["gate"] = {"type": "off"}
    RunConfig.model_validate(tiny)
    memory["variant"] = "self"
    assert problems_of(tiny) == [
        "model.memory_attention.residual: has no effect in variant self; valid: true"
    ]


def test_special_tokens_fit_the_vocabulary_and_are_distinct(tiny: dict[str, Any]) -> None:
    ids = {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4, "query": 5, "answer": 100}
    tiny["model"] |= {"special_tokens": ids, "vocab_size": 100}
    assert problems_of(tiny) == [
        "model.special_tokens.answer: found 100; must be below vocab_size, valid: 0 to 99"
    ]
    ids["answer"] = 5
    assert problems_of(tiny)[0].startswith("model.special_tokens: found {'pad': 0,")


@pytest.mark.parametrize("component", ["encoder", "decoder"])
def test_a_trained_component_needs_a_loss(tiny: dict[str, Any], component: str) -> None:
    tiny["stages"][0] |= {"components": component, f"{component}_loss_scale": 0.0}
    field = f"stages.0.{component}_loss_scale"
    assert problems_of(tiny) == [f"{field}: found 0 with components {component}; valid: above 0"]


def test_both_losses_cannot_be_off(tiny: dict[str, Any]) -> None:
    tiny["stages"][0] |= {"encoder_loss_scale": 0.0, "decoder_loss_scale": 0.0}
    assert len(problems_of(tiny)) == 1
    assert problems_of(tiny)[0].startswith("stages.0.encoder_loss_scale: found 0, as decoder_loss_scale")


def test_a_warmup_of_the_run_is_checked_for_each_stage(tiny: dict[str, Any]) -> None:
    tiny["optimizer"]["warmup_steps"] = 11
    for stage in tiny["stages"][1:]:
        stage |= {"optimizer": {"warmup_steps": 0}}
    assert problems_of(tiny) == [
        "optimizer.warmup_steps: found 11; must not exceed the steps of stage 0 (joint_lm), valid: 0 to 10"
    ]


def test_paths_are_paths(tiny: dict[str, Any]) -> None:
    assert RunConfig.model_validate(tiny).data.text == Path("/data/text")
