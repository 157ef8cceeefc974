"""What besides tensors a checkpoint holds: plain data, so that it can be read without the program."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rxt_dist.errors import CheckpointError

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands; with the dataset fingerprint it determines everything still to come."""

    step: int
    """Optimizer steps of the whole run."""
    stage_index: int
    """Position of the current stage in the run file."""
    stage_name: str
    """Name of that stage."""
    stage_step: int
    """Optimizer steps done in that stage; equal to its ``steps`` when it is finished."""
    tokens: int
    """Real tokens trained on so far in the whole run."""
    data_state: dict[str, Any]
    """Position in the stage's global data order."""
    fingerprint: str
    """Fingerprint of the stage's dataset."""
    optimizer_steps: list[int]
    """Step counters of the stage's optimizer (bias correction), one for every group of parameters, in the
    order in which they begin to train."""
    tensor_shapes: dict[str, list[int]] = field(default_factory=dict)
    """Shape of every canonical tensor."""
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> TrainerState:
        """Inverse of :meth:`to_dict`; ``source`` names the file in error messages."""
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{source}: checkpoint format version is {version!r}; this program reads {FORMAT_VERSION}"
            )
        names = {entry.name for entry in fields(cls)}
        if set(values) != names:
            difference = sorted(set(values) ^ names)
            raise CheckpointError(f"{source}: missing or unknown fields: {', '.join(difference)}")
        return cls(**values)
