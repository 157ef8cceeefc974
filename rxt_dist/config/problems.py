"""From pydantic's errors to one readable line per problem: dotted field, found value, what is valid."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rxt_dist.config.base import PROBLEMS, Problem

_MAX_VALUE_CHARS = 80

_MESSAGES = {
    "model_type": "must be a mapping of its fields",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "path_type": "must be a path (text)",
    "string_type": "must be text",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}


class _Place(NamedTuple):
    """A location of pydantic resolved against the schema."""

    path: tuple[str, ...]
    models: list[type[BaseModel]]
    """Sections that could be at the parent of the last part of the path."""
    description: str


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[Problem]:
    """The problems of ``error``, raised while validating ``model``, in the order of the fields.

    The alternatives of a union (for example an integer or ``auto``) become one problem.
    """
    texts: dict[tuple[str, ...], list[str]] = {}
    found: dict[tuple[str, ...], str] = {}
    expanded: list[Problem] = []
    for detail in error.errors(include_url=False):
        place = _resolve(model, detail)
        if detail["type"] == PROBLEMS:
            inner: list[Problem] = detail["ctx"]["problems"]
            expanded += [p.under(".".join(place.path)) if place.path else p for p in inner]
            continue
        text, value = _describe(detail, place, prefix)
        texts.setdefault(place.path, [])
        if text not in texts[place.path]:
            texts[place.path].append(text)
        found.setdefault(place.path, value)
    problems = []
    for path, alternatives in texts.items():
        if any(other[: len(path)] == path and other != path for other in texts):
            continue  # a problem inside the section says more than "or auto"
        value = f"found {found[path]}; " if found[path] else ""
        problems.append(Problem(".".join(path), value + _joined(alternatives)))
    named = [*problems, *expanded]
    return [p.under(prefix) if prefix else p for p in named]


def _describe(detail: ErrorDetails, place: _Place, prefix: str) -> tuple[str, str]:
    """Text of one error, and the value found ("" where there is none to show)."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(place, prefix), ""
    if kind == "missing":
        return f"missing; it is required: {place.description}", ""
    text = _MESSAGES.get(kind)
    if kind in ("too_long", "too_short"):
        bound = "at most" if kind == "too_long" else "at least"
        text = f"must have {bound} {detail['ctx'].get('max_length', detail['ctx'].get('min_length'))} items"
    elif text is None:
        text = detail["msg"].replace("Input should be ", "must be ").replace("a valid ", "a ")
        text = text[0].lower() + text[1:]
    value = json.dumps(detail["input"], default=str)
    return text, value if len(value) <= _MAX_VALUE_CHARS else value[:_MAX_VALUE_CHARS] + "..."


def _unknown_key(place: _Place, prefix: str) -> str:
    parent = ".".join([*([prefix] if prefix else []), *place.path[:-1]])
    valid = [name for model in place.models for name in model.model_fields]
    close = get_close_matches(place.path[-1], valid, n=1)
    if close:
        return f"unknown key; did you mean {f'{parent}.' if parent else ''}{close[0]}?"
    return f"unknown key; valid: {', '.join(valid)}"


def _joined(alternatives: list[str]) -> str:
    texts = [text.removeprefix("must be ") for text in alternatives]
    named = [any(text in other for other in texts if other != text) for text in texts]  # a path is text, too
    first, *rest = [text for text, twice in zip(alternatives, named, strict=True) if not twice]
    return " or ".join([first, *(text.removeprefix("must be ") for text in rest)])


def _resolve(model: type[BaseModel], detail: ErrorDetails) -> _Place:
    """Follow the location through the schema, leaving out the names of union alternatives."""
    path: list[str] = []
    annotation: Any = model
    parents: list[type[BaseModel]] = []
    description = ""
    last = len(detail["loc"]) - 1
    for index, part in enumerate(detail["loc"]):
        models = list(_models(annotation))
        owner = next((m for m in models if part in m.model_fields), None)
        if owner is not None and isinstance(part, str):
            parents, field = [owner], owner.model_fields[part]
            annotation, description = field.annotation, field.description or ""
            path.append(part)
        elif isinstance(part, int):
            path.append(str(part))
            annotation = _item(annotation)
        elif index == last and detail["type"] == "extra_forbidden":
            parents = models
            path.append(part)
        else:
            annotation = next((m for m in models if m.__name__ == part), annotation)
    return _Place(tuple(path), parents, description)


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for alternative in get_args(annotation):
            yield from _alternatives(alternative)
    else:
        yield annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for alternative in _alternatives(annotation):
        if isinstance(alternative, type) and issubclass(alternative, BaseModel):
            yield alternative


def _item(annotation: Any) -> Any:
    for alternative in _alternatives(annotation):
        if get_origin(alternative) in (list, tuple):
            return get_args(alternative)[0]
    return Any
