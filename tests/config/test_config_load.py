"""Reading run files: names, extends, overrides, messages, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxt_dist.config import CONFIG_FOLDER, available, load_config, load_model_config, save_resolved
from rxt_dist.config.yaml_text import dump_yaml, parse_yaml
from rxt_dist.errors import ConfigError

DATA = ["data.text=/data/text", "data.conversations=/data/conversations"]
ALL_RUNS = [
    "alpha",
    "demo",
    "micro",
    "micro-chat",
    "micro-decoder",
    "micro-encoder",
    "micro-encoder-sft",
    "mini-mlm",
    "recall",
    "tiny",
]
FOUR_STAGES = ["joint_lm", "interaction_sft", "memory_attention", "smat"]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(path: str | Path, *overrides: str, data: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*(DATA if data else []), *overrides])
    return str(caught.value)


def test_the_packaged_runs_are_these() -> None:
    assert available("runs") == ALL_RUNS


@pytest.mark.parametrize("name", ALL_RUNS)
def test_every_packaged_run_loads(name: str) -> None:
    config = load_config(name, DATA)
    assert config.runtime.run_dir == Path("runs") / name
    assert config.data.text == Path("/data/text")
    assert config.batch.packs % 4 == 0


@pytest.mark.parametrize("name", ALL_RUNS)
def test_no_packaged_run_names_a_dataset(name: str) -> None:
    config = load_config(name, require_data=False)
    assert config.data.text is None
    assert config.data.conversations is None


def test_tiny_is_small() -> None:
    config = load_config("tiny", DATA)
    assert config.precision == "fp32"
    assert config.optimizer.lr <= 1e-3
    assert [stage.name for stage in config.stages] == FOUR_STAGES
    assert all(8 <= stage.steps <= 12 for stage in config.stages)
    assert config.batch.packs * config.batch.pack_tokens <= 4096
    assert config.metrics.log_every_steps == 1


def test_micro_keeps_the_published_batch_and_optimizer() -> None:
    config = load_config("micro", DATA)
    assert config.batch.packs * config.batch.pack_tokens == 65_536
    assert config.optimizer.lr == 2e-3
    assert config.optimizer.schedule == "cosine"
    assert config.optimizer.weight_decay == 0.01
    assert config.stages[0].steps == 473
    assert config.precision == "bf16"


@pytest.mark.parametrize("path", ["tiny", "runs/tiny.yaml", "configs/runs/tiny.yaml"])
def test_packaged_files_are_found_from_any_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(path, DATA).model.name == "rxt-tiny"


def test_a_file_of_the_current_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "configs/runs/tiny.yaml", "extends: tiny\nseed: 77\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/runs/tiny.yaml", DATA).seed == 77
    assert load_config("tiny", DATA).seed == 0


def test_a_missing_run_lists_the_available_ones() -> None:
    assert message("tyni") == f"run file tyni: no such file; available runs: {', '.join(ALL_RUNS)}"


def test_a_missing_model_lists_the_available_ones(tmp_path: Path) -> None:
    expected = "no such file; available models: alpha, beta, micro, micro-plus, mini, recall, tiny"
    run = write(tmp_path / "run.yaml", "extends: tiny\nmodel: gigantic\n")
    assert message(run) == f"{run}: model: gigantic: {expected}"
    with pytest.raises(ConfigError, match="^model gigantic: " + expected):
        load_model_config("gigantic")


class TestData:
    def test_missing_datasets_name_the_field_and_the_stage(self) -> None:
        text = message("tiny", data=False)
        assert "\n  data.text: not set, but stage 0 (joint_lm) needs it; set it to a dataset folder" in text
        users = "stages 1 (interaction_sft), 2 (memory_attention), 3 (smat)"
        assert f"\n  data.conversations: not set, but {users} need it;" in text
        assert "--set data.conversations=FOLDER" in text

    def test_only_what_a_stage_needs(self) -> None:
        assert load_config("micro", ["data.text=/x"]).data.conversations is None
        assert "data.conversations: not set" in message("micro-encoder-sft", "data.text=/x", data=False)
        load_config("micro-encoder-sft", ["data.conversations=/x"])

    def test_several_stages(self) -> None:
        both = "stages=[{name: joint_lm, steps: 100}, {name: joint_lm, steps: 100}]"
        assert "stages 0 (joint_lm), 1 (joint_lm) need it" in message("micro", both, data=False)


class TestExtends:
    def test_deep_merge_and_replaced_lists(self, tmp_path: Path) -> None:
        write(tmp_path / "base.yaml", "extends: tiny\noptimizer: {lr: 5e-4}\n")
        run = write(
            tmp_path / "deep/run.yaml",
            "extends: ../base.yaml\noptimizer: {weight_decay: 0.1}\n"
            "stages:\n  - {name: joint_lm, steps: 3}\n",
        )
        config = load_config(run, DATA)
        assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-4, 0.1)
        assert config.optimizer.warmup_steps == 2
        assert [stage.steps for stage in config.stages] == [3]

    def test_later_files_win(self, tmp_path: Path) -> None:
        write(tmp_path / "a.yaml", "seed: 1\nprecision: bf16\n")
        write(tmp_path / "b.yaml", "seed: 2\n")
        run = write(tmp_path / "run.yaml", "extends: [tiny, a.yaml, b.yaml]\n")
        config = load_config(run, DATA)
        assert (config.seed, config.precision) == (2, "bf16")

    def test_the_same_file_twice_is_no_cycle(self, tmp_path: Path) -> None:
        write(tmp_path / "a.yaml", "extends: tiny\nseed: 4\n")
        write(tmp_path / "b.yaml", "extends: a.yaml\n")
        run = write(tmp_path / "run.yaml", "extends: [a.yaml, b.yaml]\n")
        assert load_config(run, DATA).seed == 4

    def test_a_cycle_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "a.yaml", "extends: b.yaml\n")
        write(tmp_path / "b.yaml", "extends: a.yaml\n")
        text = message(tmp_path / "a.yaml")
        assert "a.yaml: extends itself: " in text
        assert text.endswith(f"{tmp_path}/a.yaml -> {tmp_path}/b.yaml -> {tmp_path}/a.yaml")

    def test_a_missing_base(self, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", "extends: other.yaml\n")
        assert message(run).startswith(f"{run}: extends: other.yaml: no such file; available runs: ")

    @pytest.mark.parametrize("value", ["3", "{a: b}", "[tiny, 3]", "''"])
    def test_a_bad_extends(self, tmp_path: Path, value: str) -> None:
        run = write(tmp_path / "run.yaml", f"extends: {value}\n")
        assert "must be a file or a list of files" in message(run)


class TestModelNames:
    def test_a_mapping_changes_single_fields(self, tmp_path: Path) -> None:
        run = write(
            tmp_path / "run.yaml", "extends: tiny\nmodel: {seq_len: 32, decoder: {moe: {top_k: 1}}}\n"
        )
        model = load_config(run, DATA).model
        assert model.name == "rxt-tiny"
        assert model.seq_len == 32
        assert model.decoder.moe is not None
        assert (model.decoder.moe.top_k, model.decoder.moe.num_experts) == (1, 4)

    def test_a_name_replaces_the_extended_model(self, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", "extends: tiny\nmodel: {extends: micro, seq_len: 128}\n")
        model = load_config(run, DATA).model
        assert model.seq_len == 128
        assert model.model_copy(update={"seq_len": 256}) == load_model_config("micro")

    def test_the_replacement_reaches_over_a_list(self, tmp_path: Path) -> None:
        write(tmp_path / "m.yaml", "model: micro\n")
        run = write(tmp_path / "run.yaml", "extends: [tiny, m.yaml]\n")
        assert load_config(run, DATA).model == load_model_config("micro")

    def test_a_path_is_relative_to_the_file(self, tmp_path: Path) -> None:
        write(tmp_path / "models/mine.yaml", "extends: tiny\nname: mine\n")
        run = write(tmp_path / "runs/run.yaml", "extends: tiny\nmodel: ../models/mine.yaml\n")
        assert load_config(run, DATA).model.name == "mine"

    def test_a_model_cannot_extend_itself(self, tmp_path: Path) -> None:
        write(tmp_path / "m.yaml", "extends: ./m.yaml\n")
        run = write(tmp_path / "run.yaml", "extends: tiny\nmodel: m.yaml\n")
        assert "m.yaml: extends itself" in message(run)

    def test_null_removes_a_section(self) -> None:
        assert load_config("tiny", [*DATA, "model.decoder.moe=null"]).model.decoder.moe is None


class TestOverrides:
    def test_values_are_yaml(self) -> None:
        config = load_config(
            "tiny",
            [*DATA, "optimizer.lr=2e-4", "stages.0.steps=11", "model.memory_attention.gate={type: off}",
             "stages.1.optimizer.lr=1e-4", "checkpoint.every_steps=5", "zero.overlap_comm=true"],
        )  # fmt: skip
        assert config.optimizer.lr == 2e-4
        assert config.stages[0].steps == 11
        assert config.stages[1].steps == 10
        assert config.stages[1].optimizer.lr == 1e-4
        assert config.model.memory_attention.gate.type == "off"
        assert config.checkpoint.every_steps == 5

    def test_a_later_override_wins(self) -> None:
        assert load_config("tiny", [*DATA, "seed=1", "seed=2"]).seed == 2

    def test_the_model_can_be_replaced(self) -> None:
        config = load_config("tiny", [*DATA, "model=micro", "model.seq_len=64"])
        assert (config.model.name, config.model.seq_len) == ("rxt-alpha-micro", 64)
        assert "model: huge: no such file; available models: " in message("tiny", "model=huge")

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("seed", "must be NAME=VALUE"),
            ("=3", "must be NAME=VALUE"),
            ("model..name=3", "must be NAME=VALUE"),
            ("stages.4.steps=1", "stages.4: found index '4'; valid: 0 to 3"),
            ("stages.-1.steps=1", "stages.-1: found index '-1'; valid: 0 to 3"),
            ("stages.first.steps=1", "stages.first: found index 'first'; valid: 0 to 3"),
            ("stages.7=1", "stages.7: found index '7'; valid: 0 to 3"),
            ("optimizer.lr.peak=1", "optimizer.lr: found 0.001, which has no fields to set"),
            ("optimizer.lr.peak.x=1", "optimizer.lr: found 0.001, which has no fields to set"),
            ("seed=[1", "line 1: "),
            ("model.extends=mini", "set model=NAME"),
        ],
    )
    def test_bad_overrides(self, override: str, expected: str) -> None:
        text = message("tiny", override)
        assert text.startswith(f"--set '{override}'")
        assert expected in text

    def test_an_unknown_key_names_the_nearest(self) -> None:
        text = message("tiny", "model.embed_dims=3")
        assert text == "tiny with --set: model.embed_dims: unknown key; did you mean model.embed_dim?"

    def test_all_problems_are_listed_one_a_line(self) -> None:
        text = message("tiny", "batch.packs=0", "optimiser.lr=1", "stages.0.steps=ten")
        lines = text.split("\n")
        assert lines[0] == "tiny with --set: 3 problems"
        assert sorted(line.strip().partition(":")[0] for line in lines[1:]) == [
            "batch.packs",
            "optimiser",
            "stages.0.steps",
        ]
        assert "optimiser: unknown key; did you mean optimizer?" in text

    def test_an_override_does_not_leak_through_a_yaml_alias(self, tmp_path: Path) -> None:
        run = write(
            tmp_path / "run.yaml",
            "extends: tiny\nstages:\n"
            "  - &stage {name: joint_lm, steps: 9, optimizer: {lr: 1e-4}}\n  - *stage\n",
        )
        config = load_config(run, [*DATA, "stages.0.steps=12", "stages.0.optimizer.lr=5e-4"])
        assert [stage.steps for stage in config.stages] == [12, 9]
        assert [stage.optimizer.lr for stage in config.stages] == [5e-4, 1e-4]


class TestYaml:
    def test_syntax_errors_name_the_file_and_the_line(self, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", "seed: 1\nstages: [1, 2\nbatch: 3\n")
        assert message(run).startswith(f"{run}, line 3: ")

    def test_duplicate_keys_are_refused(self, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", "extends: tiny\noptimizer:\n  lr: 1\n  eps: 1\n  lr: 2\n")
        assert message(run) == f"{run}, line 5: duplicate key 'lr', first given on line 3"

    @pytest.mark.parametrize("text", ["3: 4\n", "? [a]\n: 1\n", "true: 1\n"])
    def test_keys_are_names(self, tmp_path: Path, text: str) -> None:
        run = write(tmp_path / "run.yaml", text)
        assert "is not a name" in message(run)

    def test_tags_cannot_build_objects(self, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", "seed: !!python/object/apply:os.getpid []\n")
        assert f"{run}, line 1: could not determine a constructor" in message(run)

    @pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- 1\n", "a list"), ("tiny\n", "a str")])
    def test_a_file_is_a_mapping(self, tmp_path: Path, text: str, found: str) -> None:
        run = write(tmp_path / "run.yaml", text)
        assert message(run) == f"{run}: found {found}; the file must be a mapping of fields"

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        run = tmp_path / "run.yaml"
        run.write_bytes(b"\xff\xfe\x00\x01")
        assert f"{run}: cannot be read" in message(run)

    def test_control_characters(self, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", "seed: \x01\n")
        assert f"{run}: not YAML" in message(run)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("off", "off"), ("yes", "yes"), ("n", "n"), ("true", True), ("False", False),
            ("null", None), ("", None), ("~", None),
            ("10", 10), ("-3", -3), ("5_000", 5000), ("010", "010"), ("0x10", "0x10"), ("1:30", "1:30"),
            ("2e-3", 2e-3), ("1.5", 1.5), ("-.5", -0.5), ("1E6", 1e6), ("1.0e-08", 1e-8),
            ("2026-01-01", "2026-01-01"), ("[1e-3, 2]", [1e-3, 2]), ("/data/x", "/data/x"),
        ],
    )  # fmt: skip
    def test_scalars(self, text: str, value: object) -> None:
        parsed = parse_yaml(text, "test")
        assert parsed == value
        assert type(parsed) is type(value)

    @pytest.mark.parametrize(
        "value", ["1e-3", "off", "010", "true", "null", "", "3", "1.5", "~", "<<", "ü", ".5"]
    )
    def test_text_is_written_so_that_it_stays_text(self, value: str) -> None:
        assert parse_yaml(dump_yaml({"a": value, "b": [value]}), "test") == {"a": value, "b": [value]}


class TestRoundTrip:
    @pytest.mark.parametrize("name", ALL_RUNS)
    def test_a_saved_config_loads_equal(self, name: str, tmp_path: Path) -> None:
        config = load_config(name, [*DATA, "runtime.run_dir='1e-3'"])
        save_resolved(config, tmp_path / "resolved.yaml")
        assert load_config(tmp_path / "resolved.yaml") == config

    def test_every_field_is_written(self, tmp_path: Path) -> None:
        config = load_config(
            "tiny", [*DATA, "stages.0.optimizer.betas=[0.5, 0.6]", "deepspeed={steps_per_print: .inf}"]
        )
        save_resolved(config, tmp_path / "resolved.yaml")
        saved = parse_yaml((tmp_path / "resolved.yaml").read_text(encoding="utf-8"), "resolved")
        assert set(saved) == set(type(config).model_fields)
        assert set(saved["model"]["decoder"]) == set(type(config.model.decoder).model_fields)
        assert load_config(tmp_path / "resolved.yaml") == config


def test_the_configs_folder_is_beside_the_package() -> None:
    assert (CONFIG_FOLDER / "runs/tiny.yaml").is_file()
