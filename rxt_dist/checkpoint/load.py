"""Find, verify and read checkpoints; nothing is read before its hash is checked."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from rxt_dist.checkpoint.fragments import Fragment, FragmentLoadPlanner, add_fragment, clip_fragment
from rxt_dist.checkpoint.save import (
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FOLDER,
    file_sha256,
    list_checkpoints,
)
from rxt_dist.checkpoint.state import TrainerState
from rxt_dist.errors import CheckpointError
from rxt_dist.model.canonical import canonical_parts, named_tensors

logger = logging.getLogger(__name__)


def find_checkpoint(run_dir: Path) -> Path | None:
    """Newest sound checkpoint of a run, or None when it has none.

    A damaged one is passed over with a warning. Raises :class:`CheckpointError` when there are
    checkpoints but none is sound.
    """
    candidates = list_checkpoints(run_dir / "checkpoints")
    for path in candidates:
        problems = verify_checkpoint(path)
        if not problems:
            return path
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", path, problems[0])
    if candidates:
        raise CheckpointError(
            f"{run_dir / 'checkpoints'}: all {len(candidates)} checkpoints are damaged; start a new run "
            "or give an undamaged one with --init-from"
        )
    return None


def locate_checkpoint(path: Path) -> Path:
    """A checkpoint folder as given, or the newest sound one of a run folder.

    Raises :class:`CheckpointError` when there is none.
    """
    found = find_checkpoint(path) if (path / "checkpoints").is_dir() else path
    if found is None:
        raise CheckpointError(f"{path / 'checkpoints'} holds no checkpoint")
    return found


def verify_checkpoint(path: Path) -> list[str]:
    """Compare every file with the manifest; returns the problems found, empty when sound."""
    try:
        files = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        expected = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return [f"{MANIFEST_FILE} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST_FILE} is not readable"]
    problems = []
    for name, size, sha256 in expected:
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif file_sha256(file) != sha256:
            problems.append(f"{name} has changed since it was written")
    return problems


class CheckpointReader:
    """Read access to one checkpoint folder whose files have been verified.

    Raises :class:`CheckpointError` when ``path`` is not a checkpoint or is damaged. ``verified=True``
    skips the hashes when another rank has just checked them.
    """

    def __init__(self, path: Path, *, verified: bool = False) -> None:
        self.path = path
        if not (path / MANIFEST_FILE).is_file():
            raise CheckpointError(
                f"{path} is not a checkpoint: it has no {MANIFEST_FILE}; give a folder such as "
                "RUN_DIR/checkpoints/step-00001000"
            )
        if not verified and (problems := verify_checkpoint(path)):
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
        try:
            values = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path / STATE_FILE} is not valid JSON: {error}") from error
        self.state = TrainerState.from_dict(values, str(path / STATE_FILE))

    def load_weights(self, model: torch.nn.Module, *, allow_missing: bool = False) -> list[str]:
        """Fill the fp32 CPU parameters and buffers of ``model`` in place, whatever mesh wrote them.

        Returns the canonical names the checkpoint lacks (only with ``allow_missing``). Raises
        :class:`CheckpointError` naming a tensor that is missing or has another shape.
        """
        missing = self.check_shapes(model)
        if missing and not allow_missing:
            raise CheckpointError(f"{self.path}: the checkpoint has no tensor {missing[0]}")
        wanted: dict[str, Fragment] = {}
        tensors = named_tensors(model)
        for name, parts in canonical_parts(model).items():
            flat = tensors[name].data.view(-1)
            for part in parts:
                held = clip_fragment(part, 0, flat)
                if held is not None and part.name in self.state.tensor_shapes:
                    add_fragment(wanted, f"weight.{part.name}", held)
        self._read(wanted)
        return missing

    def check_shapes(self, model: torch.nn.Module) -> list[str]:
        """Canonical names of ``model`` (on any device) that the checkpoint lacks.

        Raises :class:`CheckpointError` naming a tensor that has another shape.
        """
        missing = []
        for part in (part for parts in canonical_parts(model).values() for part in parts):
            stored = self.state.tensor_shapes.get(part.name)
            if stored is None:
                missing.append(part.name)
            elif tuple(stored) != part.shape:
                raise CheckpointError(
                    f"{self.path}: tensor {part.name} has shape {list(stored)}; this model needs "
                    f"{list(part.shape)}"
                )
        return missing

    def load_fragments(self, fragments: Mapping[str, Fragment]) -> None:
        """Fill the values of the given fragments in place, each from its key in the checkpoint."""
        self._read(fragments)

    def _read(self, wanted: Mapping[str, Fragment]) -> None:
        if not wanted:
            return
        reader = FileSystemReader(self.path / TENSORS_FOLDER)
        known: dict[str, Any] = reader.read_metadata().state_dict_metadata
        if absent := sorted(set(wanted) - set(known)):
            raise CheckpointError(f"{self.path}: the checkpoint has no entry {absent[0]}")
        # Earlier versions stored all tensors flat.
        fragments = {
            key: fragment.flat() if len(known[key].size) == 1 else fragment
            for key, fragment in wanted.items()
        }
        with warnings.catch_warnings():
            # Every rank reads what it needs by itself; a process without a group is warned about that.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(fragments, storage_reader=reader, planner=FragmentLoadPlanner(), no_dist=True)
