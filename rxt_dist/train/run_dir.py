"""The folder of one run: what may be started in it, and what a resumed run may change.

```
run_dir/config.yaml     resolved configuration      run_dir/metrics.jsonl   logged training steps
run_dir/eval.jsonl      evaluations                 run_dir/checkpoints/    step-*/ and latest
run_dir/tokenizer.json  the datasets' tokenizer
```
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rxt_dist.config import RunConfig, load_config, save_resolved
from rxt_dist.data.tokens import TOKENIZER_FILE
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.observe.metrics_file import EVALUATION_FILE, read_metrics

CONFIG_FILE = "config.yaml"

# What must not differ between a run and its continuation: it decides the order of the data, the
# weights or their meaning. Everything else (mesh, ZeRO, logging, checkpoints) may change.
_FIXED_SECTIONS = ("seed", "model", "precision")
_FIXED_BATCH_FIELDS = ("packs", "pack_tokens")
_FIXED_LANE_FIELDS = ("lanes", "window")  # once a stage with lanes has begun


def create_run_dir(config: RunConfig, tokenizer: Path) -> None:
    """Make the folder of a new run, with its configuration and tokenizer.

    Raises :class:`ConfigError` when it holds anything already, as results are never overwritten, and when
    it cannot be made.
    """
    folder = config.runtime.run_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"runtime.run_dir: {folder} is not empty; choose another folder or continue the run with --resume"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
        write_config(config)
    except OSError as error:
        raise ConfigError(f"runtime.run_dir: {folder} cannot be made: {error.strerror}") from error


def write_config(config: RunConfig) -> None:
    """Record ``config`` in its run folder, whole or not at all."""
    file = config.runtime.run_dir / CONFIG_FILE
    temporary = file.with_name(f"{CONFIG_FILE}.tmp")
    save_resolved(config, temporary)
    temporary.replace(file)


def text_files(folder: Path) -> dict[str, str]:
    """Name and content of the files that every checkpoint of the run repeats."""
    return {name: (folder / name).read_text(encoding="utf-8") for name in (CONFIG_FILE, TOKENIZER_FILE)}


def has_evaluation(folder: Path, **place: int | str) -> bool:
    """Whether ``eval.jsonl`` has a record with these values."""
    records = read_metrics(folder / EVALUATION_FILE)
    return any(all(record.get(key) == value for key, value in place.items()) for record in records)


def check_continuation(config: RunConfig, stage_index: int | None) -> None:
    """Compare ``config`` with the one the run was started with.

    ``stage_index`` is the stage the newest checkpoint stands in, None without one: stages after it
    may still change. Raises :class:`ConfigError` naming the first field that differs.
    """
    saved_file = config.runtime.run_dir / CONFIG_FILE
    if not saved_file.is_file():
        raise CheckpointError(f"{config.runtime.run_dir} is not a run: it has no {CONFIG_FILE}")
    saved = load_config(saved_file)
    pairs: list[tuple[str, Any, Any]] = [
        (name, getattr(saved, name), getattr(config, name)) for name in _FIXED_SECTIONS
    ]
    pairs += [
        (f"batch.{name}", getattr(saved.batch, name), getattr(config.batch, name))
        for name in _FIXED_BATCH_FIELDS
    ]
    begun = 0 if stage_index is None else stage_index + 1
    if begun > len(config.stages):
        raise ConfigError(
            f"stages: the run stands in stage {stage_index}, this configuration has {len(config.stages)}"
        )
    if any(stage.uses_lanes for stage in saved.stages[:begun]):
        pairs += [
            (f"batch.{name}", getattr(saved.batch, name), getattr(config.batch, name))
            for name in _FIXED_LANE_FIELDS
        ]
    pairs += [(f"stages.{i}", saved.stages[i], config.stages[i]) for i in range(begun)]
    for field, before, now in pairs:
        difference = _first_difference(field, _plain(before), _plain(now))
        if difference is not None:
            name, old, new = difference
            raise ConfigError(
                f"{name}: the run was started with {old!r}, found {new!r}; it cannot change on --resume"
            )


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            found = _first_difference(f"{name}.{key}", before.get(key), now.get(key))
            if found is not None:
                return found
    return name, before, now
