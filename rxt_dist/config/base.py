"""What every configuration section shares, and how a check that spans several fields reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

PROBLEMS = "rxt_problems"
"""Error type under which :func:`report` hands its problems to pydantic."""


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no conversion between types.

    The docstring under a field is its description (error messages and the documentation use it).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # the raw DeepSpeed block may hold one
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Problem(NamedTuple):
    """One thing that is wrong: the dotted name of the field, and what was found and what is valid."""

    field: str
    message: str

    def under(self, prefix: str) -> Problem:
        """The same problem seen from a section that holds this one as ``prefix``."""
        return Problem(f"{prefix}.{self.field}", self.message)

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def report(problems: list[Problem]) -> None:
    """Fail the validation of a section with all ``problems``; for use in a pydantic validator."""
    if problems:
        summary = "; ".join(str(problem) for problem in problems)
        raise PydanticCustomError(PROBLEMS, "{summary}", {"summary": summary, "problems": problems})


def deep_merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``: mappings are merged key by key, lists and plain values replaced."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = deep_merge(old, value)
        merged[key] = value
    return merged


def divisors(number: int) -> list[int]:
    """All positive divisors of ``number``, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def listed(values: Sequence[object]) -> str:
    """``values`` as text for an error message."""
    return ", ".join(str(value) for value in values) if values else "none"
