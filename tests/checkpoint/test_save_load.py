"""Checkpoints are written whole, read by any division of the ranks, and damage is noticed."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_samples import (
    KILLED,
    SHAPES,
    content,
    keys,
    operations,
    runs_of_ranks,
    save_and_die,
    save_made_up,
    trainer_state,
)
from helpers.damage import flip_bit, truncate, zero_hole
from helpers.launch import run_function
from helpers.runs import tensors, tree
from torch import nn

from rxt_dist.checkpoint import CheckpointReader, find_checkpoint, save_checkpoint
from rxt_dist.checkpoint.fragments import Fragment
from rxt_dist.checkpoint.load import verify_checkpoint
from rxt_dist.errors import CheckpointError

# Reading without a process group is what is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FILES = ("config.yaml", "manifest.json", "tensors/.metadata", "tensors/__0_0.distcp", "trainer.json")


def assert_content(checkpoint: Path, step: int) -> None:
    """Every value, read with torch's own reader and with ours."""
    stored = tensors(checkpoint)
    assert stored.keys() == set(keys())
    for key, values in stored.items():
        assert torch.equal(values.flatten(), content(key, step)), key
        assert values.shape == SHAPES[key.partition(".")[2]]
    reader = CheckpointReader(checkpoint)
    assert reader.state == trainer_state(step)
    wanted = {
        key: Fragment.run(len(content(key, step)), 0, torch.empty(len(content(key, step)))) for key in keys()
    }
    reader.load_fragments(wanted)
    assert all(torch.equal(fragment.chunks[0][1], content(key, step)) for key, fragment in wanted.items())


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_division_is_read_back_by_any_other(tmp_path: Path, ranks: int) -> None:
    assert run_function(ranks, save_made_up, tmp_path, 7, 2, 40 + ranks) == [0] * ranks
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint == tmp_path / "checkpoints" / "step-00000007"
    assert_content(checkpoint, 7)
    reader = CheckpointReader(checkpoint)
    for seed in range(5):  # what a rank of a random other mesh would ask for
        for rank in range(4):
            wanted, expected = {}, {}
            for number, key in enumerate(keys()):
                whole = content(key, 7)
                run = runs_of_ranks(whole.numel(), 4, 100 * seed + number)[rank]
                if run.stop > run.start:
                    size = run.stop - run.start
                    wanted[key] = Fragment.run(whole.numel(), run.start, torch.empty(size))
                    expected[key] = whole[run]
            reader.load_fragments(wanted)
            assert all(torch.equal(wanted[key].chunks[0][1], values) for key, values in expected.items())


def test_only_the_newest_checkpoints_are_kept(group: None, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10, 100000000, 200000000):
        save_made_up(tmp_path, step, keep_last=2)
    assert {path.name for path in folder.iterdir()} == {"latest", "step-100000000", "step-200000000"}
    assert (folder / "latest").read_text() == "step-200000000\n"
    assert find_checkpoint(tmp_path) == folder / "step-200000000"
    assert_content(folder / "step-100000000", 100000000)
    save_made_up(tmp_path, 200000001, keep_last=1)
    assert {path.name for path in folder.iterdir()} == {"latest", "step-200000001"}


def test_leftovers_of_a_crash_are_removed(group: None, tmp_path: Path) -> None:
    """Also those of a step that is never saved again."""
    folder = tmp_path / "checkpoints"
    for name in ("step-00000002.tmp", "step-00000003.tmp"):
        (folder / name / "tensors").mkdir(parents=True)
        (folder / name / "tensors" / "__0_0.distcp").write_bytes(b"half")
    save_made_up(tmp_path, 2)
    assert {path.name for path in folder.iterdir()} == {"latest", "step-00000002"}
    assert_content(folder / "step-00000002", 2)


def test_a_new_checkpoint_outlives_a_damaged_one_of_a_later_step(group: None, tmp_path: Path) -> None:
    """A resume went behind the damaged one; the run's new present is what counts."""
    for step in (6, 8):
        save_made_up(tmp_path, step)
    flip_bit(tmp_path / "checkpoints" / "step-00000008" / "tensors" / "__0_0.distcp")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000006"
    save_made_up(tmp_path, 7, keep_last=1)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000007"
    assert_content(tmp_path / "checkpoints" / "step-00000007", 7)


def test_a_damaged_checkpoint_in_the_way_is_replaced(group: None, tmp_path: Path) -> None:
    flip_bit(save_made_up(tmp_path, 3) / "trainer.json")
    assert_content(save_made_up(tmp_path, 3), 3)


@pytest.mark.parametrize(
    ("keep_last", "in_the_way"),
    [
        (1, False),
        (2, True),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
    ],
    ids=["keep 1", "keep 2, replacing a damaged one", "keep 1, replacing a damaged one", "keep 2"],
)
def test_a_crash_at_any_moment_leaves_a_sound_checkpoint(
    group: None, tmp_path: Path, keep_last: int, in_the_way: bool
) -> None:
    """The process dies before each operation on the file system in turn; no folder is ever half there."""
    start = tmp_path / "start"
    save_made_up(start, 1)
    damaged: dict[str, bytes] = {}
    if in_the_way:
        flip_bit(save_made_up(start, 2, keep_last=5) / "tensors" / "__0_0.distcp")
        damaged = tree(start / "checkpoints" / "step-00000002")

    outcomes = set()
    for fatal in range(200):
        run_dir = tmp_path / "run"
        shutil.copytree(start, run_dir)
        (code,) = run_function(1, save_and_die, run_dir, 2, keep_last, fatal)
        folder = run_dir / "checkpoints"
        for path in folder.glob("step-*"):
            if path.suffix != ".tmp":
                assert verify_checkpoint(path) == [] or tree(path) == damaged, (fatal, path.name)
        found = find_checkpoint(run_dir)
        assert found is not None, fatal
        step = int(found.name[5:])
        outcomes.add(step)
        assert_content(found, step)
        # The name of a damaged newest checkpoint leads nowhere while that is replaced.
        assert in_the_way or (folder / (folder / "latest").read_text().strip()).is_dir(), fatal
        if code == 0:
            break
        assert code == KILLED
        assert_content(save_made_up(run_dir, 2, keep_last), 2)
        names = {path.name for path in folder.iterdir()}
        kept = {"step-00000001", "step-00000002"} if keep_last == 2 else {"step-00000002"}
        assert names == {"latest", *kept}, fatal
        shutil.rmtree(run_dir)
    assert code == 0
    assert fatal > 10, "too few operations were seen: is something not caught any more?"
    assert outcomes == {1, 2}


def test_a_full_disk_leaves_the_previous_checkpoint(group: None, tmp_path: Path) -> None:
    """Whichever operation fails, the caller gets an OSError."""
    first = save_made_up(tmp_path, 1)
    before = tree(first)

    def save_without_room(fatal: int) -> None:
        def fail(number: int, _name: str) -> None:
            if number == fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with operations(fail):
            save_made_up(tmp_path, 2)

    for fatal in range(8):  # making folders, tensor files, metadata, texts
        with pytest.raises(OSError) as caught:
            save_without_room(fatal)
        assert caught.value.errno == errno.ENOSPC
        assert find_checkpoint(tmp_path) == first
        assert tree(first) == before
    assert_content(save_made_up(tmp_path, 2), 2)


@pytest.fixture
def sound(group: None, tmp_path: Path) -> Path:
    return save_made_up(tmp_path, 4)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip_bit, truncate, zero_hole, Path.unlink], ids=lambda d: d.__name__)
def test_every_damage_of_every_file_is_noticed(
    sound: Path, file: str, damage: Callable[[Path], None]
) -> None:
    assert verify_checkpoint(sound) == []
    assert sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file()) == list(FILES)
    damage(sound / file)
    problems = verify_checkpoint(sound)
    assert problems
    if file != "manifest.json":
        assert [problem.split(" ")[0] for problem in problems] == [file]
    missing_manifest = file == "manifest.json" and damage is Path.unlink
    with pytest.raises(CheckpointError, match="not a checkpoint" if missing_manifest else "damaged"):
        CheckpointReader(sound)


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(sound: Path) -> None:
    manifest = sound / "manifest.json"
    original = manifest.read_bytes()
    chance = random.Random(0)
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << chance.randrange(8)
        manifest.write_bytes(changed)
        assert verify_checkpoint(sound), (position, bytes(changed[position - 5 : position + 5]))
    manifest.write_bytes(original)
    assert verify_checkpoint(sound) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": []}', '{"files": {"x": 1}}', '{"files": 3}', "null"]
)
def test_a_manifest_of_another_form_is_damage(sound: Path, text: str) -> None:
    (sound / "manifest.json").write_text(text)
    assert verify_checkpoint(sound)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    group: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save_made_up(tmp_path, step, keep_last=3)
    truncate(tmp_path / "checkpoints" / "step-00000003" / "trainer.json")
    flip_bit(tmp_path / "checkpoints" / "step-00000002" / "tensors" / "__0_0.distcp")
    with caplog.at_level(logging.WARNING, "rxt_dist"):
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("rxt_dist")]
    assert len(messages) == 2
    assert "step-00000003" in messages[0]
    assert "trainer.json" in messages[0]
    assert "step-00000002" in messages[1]
    assert "__0_0.distcp" in messages[1]
    flip_bit(tmp_path / "checkpoints" / "step-00000001" / "config.yaml")
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        find_checkpoint(tmp_path)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000003.tmp").mkdir(parents=True)
    assert find_checkpoint(tmp_path) is None


class Small(nn.Module):
    """A model with one fused parameter."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.empty(rows + 2, 3))
        self.bias = nn.Parameter(torch.full((5,), 9.0))

    def canonical_parts(self) -> dict[str, list[tuple[str, int]]]:
        return {"fused": [("first", self.fused.shape[0] - 2), ("second", 2)]}


@pytest.fixture
def small(group: None, tmp_path: Path) -> Path:
    """A checkpoint of ``Small``."""
    shapes = {"first": (4, 3), "second": (2, 3), "bias": (5,)}
    values = {"first": torch.arange(12.0), "second": torch.arange(6.0) + 100, "bias": torch.arange(5.0)}
    fragments = {f"weight.{name}": Fragment.run(len(flat), 0, flat) for name, flat in values.items()}
    state = trainer_state(1, shapes)
    return save_checkpoint(tmp_path, state, fragments, text_files={}, keep_last=1)


def test_weights_are_joined_into_fused_parameters(small: Path) -> None:
    model = Small()
    assert CheckpointReader(small).load_weights(model) == []
    expected = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [100, 101, 102], [103, 104, 105]]
    assert model.fused.tolist() == expected
    assert model.bias.tolist() == [0, 1, 2, 3, 4]


def test_a_tensor_of_another_shape_is_named(small: Path) -> None:
    model = Small(rows=6)
    before = model.bias.clone()
    with pytest.raises(CheckpointError, match=r"tensor first has shape \[4, 3\]; this model needs \[6, 3\]"):
        CheckpointReader(small).load_weights(model)
    assert torch.equal(model.bias, before), "nothing is loaded in part"


def test_a_missing_tensor_is_named(small: Path) -> None:
    model = Small()
    model.extra = nn.Parameter(torch.full((2,), 3.0))
    reader = CheckpointReader(small)
    with pytest.raises(CheckpointError, match="no tensor extra"):
        reader.load_weights(model)
    assert model.bias.tolist() == [9.0] * 5
    assert reader.load_weights(model, allow_missing=True) == ["extra"]
    assert model.bias.tolist() == [0, 1, 2, 3, 4]
    assert model.extra.tolist() == [3.0, 3.0]
    with pytest.raises(CheckpointError, match=r"no entry exp_avg\.bias"):
        reader.load_fragments({"exp_avg.bias": Fragment.run(5, 0, torch.empty(5))})


def test_a_checkpoint_of_another_format_is_refused(small: Path) -> None:
    state = json.loads((small / "trainer.json").read_text())
    for change, message in (({"format_version": 1}, "format version is 1"), ({"surprise": 1}, "surprise")):
        (small / "trainer.json").write_text(json.dumps(state | change))
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(small, verified=True)
