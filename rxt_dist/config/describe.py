"""The page that lists all configuration fields, made from the schema.

python -m rxt_dist.config.describe > docs/configuration-fields.md
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rxt_dist.config.run import RunConfig

_HEADER = """\
# Configuration fields

Made from the schema by `python -m rxt_dist.config.describe > docs/configuration-fields.md`; do not edit.
[Configuration](configuration.md) says how run files are written, [Stages](stages.md) which stage has which
fields. `stages.N` is stage number N, counted from 0.
"""
_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    Path: "path",
    type(None): "`null`",
    Any: "anything",
}
_BOUNDS = (
    (Ge, "ge", "from"),
    (Gt, "gt", "above"),
    (Le, "le", "to"),
    (Lt, "lt", "below"),
    (MinLen, "min_length", "at least"),
)


def configuration_table() -> str:
    """All fields of a run file as a page of Markdown: one table a section, in the order of the schema."""
    places: dict[type[BaseModel], list[str]] = {}
    for path, section in _sections(RunConfig, ""):
        places.setdefault(section, []).append(path)
    parts = [_HEADER]
    for section, (first, *others) in places.items():
        title = f"`{first}`" if first else "The run"
        parts.append(f"## {title}\n\n{' '.join((section.__doc__ or '').split())}\n")
        if others:
            parts.append(f"The same fields: {', '.join(f'`{other}`' for other in others)}.\n")
        rows = [_row(name, field) for name, field in _values(section)]
        head = ["| field | value | default | what it is |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *rows]) + "\n")
    return "\n".join(parts)


def _sections(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """``section`` and all sections below it, each with its dotted path."""
    yield path, section
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            below = f"{path}.{name}" if path else name
            yield from _sections(inner, f"{below}.N" if get_origin(field.annotation) is list else below)


def _values(section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Fields with something to say beyond the section of their name: a value, or a default of their own."""
    for name, field in section.model_fields.items():
        if _section_of(field) is None or field.default_factory is None:
            yield name, field


def _row(name: str, field: FieldInfo) -> str:
    value = _value(field.annotation, field.metadata)
    text = " ".join((field.description or "").split())
    cells = (f"`{name}`", value, _default(field), text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _value(annotation: Any, constraints: list[Any]) -> str:
    """What a field may hold, in words; ``constraints`` are the ranges that belong to ``annotation``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        outer = arguments[1:]
        titles = [extra.title for extra in outer if isinstance(extra, FieldInfo) and extra.title]
        if titles:
            return titles[0]
        inner = [c for extra in outer for c in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _value(arguments[0], [*inner, *constraints])
    if origin in (Union, types.UnionType):
        return " or ".join(_value(argument, constraints) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"list of: {_value(arguments[0], [])}{_range(constraints)}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_value(arguments[0], [])} each"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES[annotation] + (_range(constraints) if annotation in (int, float) else "")


def _range(constraints: list[Any]) -> str:
    """The bounds among ``constraints`` in parentheses, with a leading blank."""
    words = [
        f"{word} {getattr(constraint, attribute)}"
        for kind, attribute, word in _BOUNDS
        for constraint in constraints
        if isinstance(constraint, kind)
    ]
    return f" ({', '.join(words)})" if words else ""


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, by itself, in a list or as one of several alternatives."""
    pending = [field.annotation]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        pending += get_args(annotation)
    return None


if __name__ == "__main__":
    sys.stdout.write(configuration_table())
