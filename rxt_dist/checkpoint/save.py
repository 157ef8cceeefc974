"""Write one checkpoint so that it is complete or absent, whatever happens meanwhile.

Everything is written into ``step-N.tmp``; files and folder are synced, then the folder is renamed and
``latest`` replaced by rename. A folder without ``.tmp`` is therefore always complete, and its
``manifest.json`` (written last) lets a reader detect later damage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from rxt_dist.checkpoint.fragments import Fragment, FragmentSavePlanner
from rxt_dist.checkpoint.state import TrainerState
from rxt_dist.files import fsync_folder, write_synced

logger = logging.getLogger(__name__)

TENSORS_FOLDER = "tensors"
STATE_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"
_READ_BYTES = 1 << 22


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def save_checkpoint(
    run_dir: Path,
    state: TrainerState,
    tensors: Mapping[str, Fragment],
    *,
    text_files: Mapping[str, str],
    keep_last: int,
) -> Path:
    """Save on all ranks together and return the finished folder.

    ``tensors`` holds this rank's fragments by key (``weight.NAME``, ``exp_avg.NAME``,
    ``exp_avg_sq.NAME``); every element must be held by exactly one rank. ``text_files`` (name ->
    content, written by rank 0) travel with the checkpoint. The ``keep_last`` newest checkpoints stay.
    Raises OSError when the disk refuses; the previous checkpoint is untouched then.
    """
    final = checkpoint_folder(run_dir, state.step)
    temporary = final.with_name(final.name + ".tmp")
    main = dist.get_rank() == 0
    if main:
        for leftover in final.parent.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    dist.barrier()
    writer = FileSystemWriter(temporary / TENSORS_FOLDER, sync_files=True)
    try:
        save(dict(tensors), storage_writer=writer, planner=FragmentSavePlanner())
    except CheckpointException as error:
        raise _cause(error) from error
    hashes = _gather_hashes(temporary / TENSORS_FOLDER)
    if main:
        write_synced(temporary / STATE_FILE, json.dumps(state.to_dict(), indent=1))
        for name, content in text_files.items():
            write_synced(temporary / name, content)
        for path in sorted(temporary.iterdir()):
            if path.is_file():
                hashes[path.name] = file_sha256(path)
        files = {
            name: {"sha256": value, "bytes": (temporary / name).stat().st_size}
            for name, value in hashes.items()
        }
        write_synced(temporary / MANIFEST_FILE, json.dumps({"files": files}, indent=1, sort_keys=True))
        _publish(temporary, final)
        _remove_old(final, keep_last)
    dist.barrier()
    return final


def _cause(error: CheckpointException) -> OSError:
    """What went wrong on the first of the ranks that failed; DCP's own exception hides from `except`."""
    rank, (cause, _) = next(iter(error.failures.items()))
    number = cause.errno if isinstance(cause, OSError) else None
    return OSError(number, f"rank {rank} could not write the checkpoint: {cause}")


def _gather_hashes(folder: Path) -> dict[str, str]:
    """Hash every tensor file once, on the rank that wrote it; the metadata file on rank 0."""
    rank = dist.get_rank()
    own = {
        f"{TENSORS_FOLDER}/{path.name}": file_sha256(path)
        for path in sorted(folder.iterdir())
        if path.name.startswith(f"__{rank}_") or (rank == 0 and path.name == ".metadata")
    }
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {name: value for part in gathered for name, value in part.items()}


def _publish(temporary: Path, final: Path) -> None:
    fsync_folder(temporary / TENSORS_FOLDER)
    fsync_folder(temporary)
    if final.exists():
        # Only a damaged checkpoint that a resume went behind can be in the way; it is replaced.
        _remove(final, "replaced")
    temporary.rename(final)
    latest = final.parent / LATEST_FILE
    write_synced(latest.with_name(LATEST_FILE + ".tmp"), final.name + "\n")
    latest.with_name(LATEST_FILE + ".tmp").replace(latest)
    fsync_folder(final.parent)


def _remove_old(newest: Path, keep_last: int) -> None:
    """Remove all but ``keep_last`` checkpoints, counted from ``newest`` back.

    Those of later steps go too: a resume went behind them because they are damaged.
    """
    found = list_checkpoints(newest.parent)
    position = found.index(newest)
    for path in (*found[:position], *found[position + keep_last :]):
        logger.info("removing checkpoint %s", path.name)
        _remove(path, "removed")


def _remove(path: Path, reason: str) -> None:
    # Renamed first so that a half-removed folder is never taken for a checkpoint.
    doomed = path.with_name(f"{path.name}.{reason}.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in ``folder``, newest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)
