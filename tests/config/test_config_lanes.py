"""Settings of the memory stages: fields that have no effect, lanes that cannot be dealt out."""

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
TEXT_STAGES = ("joint_lm", "interaction_sft")
LANE_STAGES = ("context_sft", "memory_attention", "smat")
ALL_STAGES = TEXT_STAGES + LANE_STAGES
FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "components": ("decoder", TEXT_STAGES),
    "masking_probability": ("0.3", TEXT_STAGES),
    "encoder_loss_scale": ("0.5", TEXT_STAGES),
    "decoder_loss_scale": ("0.5", TEXT_STAGES),
    "slot_dropout": ("0.1", TEXT_STAGES),
    "noise_level": ("0.1", (*TEXT_STAGES, "memory_attention")),
    "label_noise_level": ("0.1", ("memory_attention",)),
    "label_weight_floor": ("0.1", ("memory_attention",)),
    "label_weight_jitter": ("0.15", ("memory_attention",)),
    "stm_difference_scale": ("0.001", ("memory_attention",)),
    "unused_slots": ("kept", ("memory_attention",)),
    "frozen": ("[encoder]", ("smat",)),
    "unfreeze": ("{encoder: 4}", ("smat",)),
    "system_prompts": ("true", ("context_sft", "smat")),
    "window": ("3", LANE_STAGES),
}
"""Value, and the stages in which the field has an effect."""


def run(stage: str, *overrides: str) -> RunConfig:
    """A run of one stage, given as the fields of a mapping."""
    values = [*DATA, f"stages=[{{{stage}}}]", "optimizer.warmup_steps=0", *overrides]
    return load_config("tiny", values)


def message(stage: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(stage, *overrides)
    return str(caught.value)


def test_every_field_of_a_stage_is_in_the_table() -> None:
    common = {"name", "steps", "optimizer"}
    assert set(FIELDS) | common == set(type(run("name: smat, steps: 1").stages[0]).model_fields)


@pytest.mark.parametrize("stage", ALL_STAGES)
@pytest.mark.parametrize("field", FIELDS)
def test_fields_are_accepted_where_they_have_an_effect_and_refused_elsewhere(field: str, stage: str) -> None:
    value, stages = FIELDS[field]
    text = f"name: {stage}, steps: 9, {field}: {value}"
    if stage in stages:
        given: Any = getattr(run(text).stages[0], field)
        assert given != type(run(text).stages[0]).model_fields[field].default
        return
    found = message(text)
    assert f"stages.0.{field}: found" in found
    assert value.strip("[{}]").partition(":")[0] in found.lower()
    assert f"no effect in stage {stage}" in found
    for name in stages:
        assert name in found
    assert "remove it" in found


@pytest.mark.parametrize(("field", "value"), [("noise_level", -1), ("label_weight_jitter", 1.5)])
def test_values_out_of_range(field: str, value: float) -> None:
    found = message(f"name: memory_attention, steps: 1, {field}: {value}")
    assert f"stages.0.{field}: found {value}" in found


def test_several_useless_fields_are_all_named() -> None:
    found = message("name: smat, steps: 1, noise_level: 0.1, slot_dropout: 0.2")
    assert "stages.0.noise_level" in found
    assert "stages.0.slot_dropout" in found


class TestFrozen:
    @pytest.mark.parametrize("frozen", ["", "encoder", "memory_attention, decoder"])
    def test_two_components_can_be_frozen(self, frozen: str) -> None:
        run(f"name: smat, steps: 1, frozen: [{frozen}]")

    def test_all_three_are_refused(self) -> None:
        found = message("name: smat, steps: 1, frozen: [encoder, memory_attention, decoder]")
        assert "stages.0.frozen: all components are frozen" in found

    def test_unknown_components_are_refused(self) -> None:
        found = message("name: smat, steps: 1, frozen: [head]")
        assert "stages.0.frozen.0" in found
        for valid in ("encoder", "decoder", "memory_attention"):
            assert valid in found


class TestUnfreeze:
    @pytest.mark.parametrize(
        "fields",
        [
            "unfreeze: {memory_attention: 40, encoder: 80}",
            "unfreeze: {decoder: 1}",
            "unfreeze: {encoder: 99}, frozen: [memory_attention]",
            "frozen: [encoder, memory_attention]",
        ],
    )
    def test_schedules(self, fields: str) -> None:
        run(f"name: smat, steps: 100, {fields}")

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            (
                "unfreeze: {encoder: 100}",
                "unfreeze.encoder: found 100, so that it would never train; valid: 1 to 99",
            ),
            ("unfreeze: {encoder: 0}", "unfreeze.encoder: found 0"),
            ("unfreeze: {head: 4}", "unfreeze.head"),
            ("unfreeze: {encoder: soon}", 'unfreeze.encoder: found "soon"'),
            ("unfreeze: 4", "unfreeze: found 4"),
            ("unfreeze: {encoder: 4}, frozen: [encoder]", "found 4, but `frozen` lists encoder; remove one"),
            (
                "unfreeze: {encoder: 4, decoder: 4, memory_attention: 5}",
                "unfreeze: all components are frozen at the beginning",
            ),
            (
                "unfreeze: {encoder: 4}, frozen: [decoder, memory_attention]",
                "unfreeze: all components are frozen at the beginning",
            ),
        ],
    )
    def test_mistakes(self, fields: str, expected: str) -> None:
        found = message(f"name: smat, steps: 100, {fields}")
        assert "stages.0.unfreeze" in found
        assert expected in found


def test_what_is_recomputed_is_one_of_two() -> None:
    assert run("name: smat, steps: 1", "runtime.recompute=interaction").runtime.recompute == "interaction"
    found = message("name: smat, steps: 1", "runtime.recompute=layer")
    assert 'runtime.recompute: found "layer"' in found
    assert "interaction" in found


class TestLanes:
    def test_text_stages_need_none(self) -> None:
        assert run("name: joint_lm, steps: 1", "batch.lanes=null").batch.lanes is None

    @pytest.mark.parametrize("stage", LANE_STAGES)
    def test_the_memory_stages_need_them(self, stage: str) -> None:
        found = message(f"name: {stage}, steps: 1", "batch.lanes=null")
        assert "batch.lanes: not set" in found
        assert f"stage 0 ({stage})" in found

    @pytest.mark.parametrize(("field", "value"), [("lanes", 0), ("window", 0), ("micro_lanes", 0)])
    def test_there_is_at_least_one_of_each(self, field: str, value: int) -> None:
        assert f"batch.{field}: found {value}" in message("name: smat, steps: 1", f"batch.{field}={value}")

    def test_micro_lanes_must_divide_the_lanes(self) -> None:
        found = message("name: smat, steps: 1", "batch.lanes=12", "batch.micro_lanes=5")
        assert "batch.micro_lanes: found 5; must divide batch.lanes (12)" in found
        assert "1, 2, 3, 4, 6" in found

    @pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
    def test_ranks_that_divide_the_lanes(self, ranks: int) -> None:
        assert check_world_size(run("name: smat, steps: 1", "batch.lanes=12"), ranks) == ranks

    @pytest.mark.parametrize("ranks", [5, 8, 24])
    def test_other_ranks_list_the_valid_ones(self, ranks: int) -> None:
        with pytest.raises(MeshError) as caught:
            check_world_size(run("name: smat, steps: 1", "batch.lanes=12"), ranks)
        assert str(caught.value) == (
            f"world size: found {ranks} ranks; the data-parallel size must divide batch.lanes (12), "
            "valid world sizes: 1, 2, 3, 4, 6, 12"
        )

    def test_ranks_must_divide_the_micro_batches_of_lanes(self) -> None:
        config = run("name: smat, steps: 1", "batch.lanes=12", "batch.micro_lanes=4")
        assert check_world_size(config, 3) == 3
        with pytest.raises(
            MeshError, match=r"batch.lanes \(12\) / batch.micro_lanes \(4\), valid world sizes: 1, 3$"
        ):
            check_world_size(config, 2)

    def test_every_stage_of_a_run_must_fit(self) -> None:
        """8 packs run on 8 ranks; 4 lanes do not."""
        config = load_config("tiny", [*DATA, "batch.lanes=4"])
        assert check_world_size(config, 4) == 4
        with pytest.raises(MeshError, match=r"batch.lanes \(4\)"):
            check_world_size(config, 8)

    @pytest.mark.parametrize(
        ("micro", "dp", "lanes", "accumulation"),
        [("auto", 1, 12, 1), ("auto", 4, 3, 1), (1, 4, 1, 3), (6, 2, 6, 1), (2, 2, 2, 3)],
    )
    def test_accumulation_follows_from_lanes(
        self, micro: object, dp: int, lanes: int, accumulation: int
    ) -> None:
        config = run("name: smat, steps: 1", "batch.lanes=12", f"batch.micro_lanes={micro}", "batch.packs=8")
        stage = config.stages[0]
        assert micro_units(config, stage, dp) == lanes
        assert accumulation_steps(config, stage, dp) == accumulation
        settings = deepspeed_config(config, stage, dp_size=dp, optimizer=stage_optimizer(config, stage))
        assert settings["gradient_accumulation_steps"] == accumulation


@pytest.mark.parametrize("norm", ["adaptive", "positional"])
def test_norms_with_running_means_cannot_be_trained(norm: str) -> None:
    setting = f"model.memory_attention.norm={norm}"
    for stage in LANE_STAGES:
        assert "model.memory_attention.norm" in message(f"name: {stage}, steps: 1", setting)
    run("name: joint_lm, steps: 1", setting)
