"""Meshes by name, and which of them a run fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rxt_dist.config import check_world_size, load_config
from rxt_dist.config.base import divisors
from rxt_dist.errors import ConfigError

_PART = re.compile(r"(dp|tp|ep|zero)([1-9]\d*)|(sp)")


@dataclass(frozen=True)
class MeshName:
    """A mesh, and the settings of a run on it."""

    name: str
    ranks: int
    tensor_size: int
    expert_size: int
    zero: int | None
    """``zero.stage``; None: as the run has it."""
    divides_tokens: bool = False
    """``parallel.sequence_parallel``"""

    def overrides(self) -> list[str]:
        """For ``--set``, after those of the user."""
        found = [f"parallel.tensor_size={self.tensor_size}", f"parallel.expert_size={self.expert_size}"]
        found.append(f"parallel.sequence_parallel={str(self.divides_tokens).lower()}")
        if self.zero is not None:
            found.append(f"zero.stage={self.zero}")
        if self.zero == 3:  # not compiled
            found.append("runtime.compile=false")
        return found

    def check(self, config: str, overrides: Sequence[str]) -> None:
        """Raise :class:`ConfigError` where the run does not fit the mesh."""
        try:
            loaded = load_config(config, [*overrides, *self.overrides()], require_data=False)
            check_world_size(loaded, self.ranks)
        except ConfigError as error:
            raise type(error)(f"mesh {self.name}: {error}") from None


def parse_mesh(name: str, ranks: int) -> MeshName:
    """The mesh ``name`` on at most ``ranks`` ranks.

    Raises:
        ConfigError: it is no name of a mesh, or needs more ranks.
    """
    parts = [_PART.fullmatch(part) for part in name.split("-")]
    sizes = {part[1] or part[3]: int(part[2] or 1) for part in parts if part is not None}
    if None in parts or len(sizes) < len(parts):
        raise ConfigError(f"--meshes: found {name}; valid: dpN, tpN, epN, zeroN, sp, joined by -")
    tensor_size = sizes.get("tp", 1)
    needed = sizes["dp"] * tensor_size if "dp" in sizes else ranks
    if needed > ranks:
        raise ConfigError(f"--meshes: {name} has {needed} ranks; valid: at most --ranks ({ranks})")
    return MeshName(name, needed, tensor_size, sizes.get("ep", 1), sizes.get("zero"), "sp" in sizes)


def fitting_meshes(config: str, overrides: Sequence[str], ranks: int) -> list[MeshName]:
    """All meshes of ``ranks`` ranks that a run fits.

    Raises:
        ConfigError: it fits none; the message is that of the first.
    """
    found, problems = [], []
    for tensor_size in divisors(ranks):
        for expert_size in divisors(ranks):
            sizes = {"dp": ranks // tensor_size, "tp": tensor_size, "ep": expert_size}
            shown = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] or ["dp1"]
            mesh = parse_mesh("-".join(shown), ranks)
            try:
                mesh.check(config, overrides)
            except ConfigError as error:
                problems.append(error)
            else:
                found.append(mesh)
    if not found:
        raise problems[0]
    return found
