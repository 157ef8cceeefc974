"""Reading a run file: ``extends``, model names, ``--set`` overrides, validation.

Names of files, in ``extends``, ``model`` and on the command line, follow one rule: a bare name (no folder,
no ``.yaml``) is a file of the packaged ``configs`` folder, ``models/NAME.yaml`` for a model and
``runs/NAME.yaml`` for a run; anything else is a path, relative to the file that contains it.

``extends`` takes one name or a list; later files and at last the file itself are merged over earlier
ones, mappings key by key, lists and plain values replaced. ``model: NAME`` is short for
``model: {extends: NAME}``; both replace the model of an extended run file, while a ``model`` mapping
without ``extends`` changes single fields of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

import rxt_dist
from rxt_dist.config.base import Problem, deep_merge
from rxt_dist.config.dataset import data_problems
from rxt_dist.config.model import ModelConfig
from rxt_dist.config.problems import explain
from rxt_dist.config.run import RunConfig
from rxt_dist.config.yaml_text import dump_yaml, parse_yaml
from rxt_dist.errors import ConfigError

CONFIG_FOLDER = Path(rxt_dist.__file__).resolve().parent.parent / "configs"
"""The packaged configuration files."""

FileKind = Literal["models", "runs"]
_SUFFIXES = (".yaml", ".yml")


def load_config(path: str | Path, overrides: Sequence[str] = (), *, require_data: bool = True) -> RunConfig:
    """Read, override and check a run file.

    Args:
        path: a file relative to the current folder or to the packaged ``configs`` folder, or the bare
            name of a packaged run.
        overrides: ``a.b=c`` each, applied in order after all files; ``c`` is YAML, items of a list are
            numbered from 0 (``stages.0.steps=10``). ``model=NAME`` replaces the model.
        require_data: whether the stages' datasets must be set; false for tools that train nothing.

    Raises:
        ConfigError: anything is wrong; the message lists every problem.
    """
    file = _find_run(path)
    data = _read(file, "runs", ()).data
    for override in overrides:
        _apply_override(data, override)
    source = f"{path} with --set" if overrides else str(path)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise _config_error(source, explain(error, RunConfig)) from error
    if require_data and (problems := data_problems(config)):
        raise _config_error(source, problems)
    return config


def load_model_config(path: str | Path) -> ModelConfig:
    """Read and check a model file, or the packaged model of a bare name.

    Raises:
        ConfigError: anything is wrong; the message lists every problem.
    """
    file = _locate(str(path), "models", Path())
    if not file.is_file():
        raise _missing_file(f"model {path}", "models")
    try:
        return ModelConfig.model_validate(_read(file, "models", ()).data)
    except ValidationError as error:
        raise _config_error(str(path), explain(error, ModelConfig)) from error


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write every field of ``config``; :func:`load_config` reads the file back to an equal object."""
    path.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")


def _config_error(source: str, problems: list[Problem]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{source}: {problems[0]}")
    return ConfigError("\n  ".join([f"{source}: {len(problems)} problems", *map(str, problems)]))


def available(kind: FileKind) -> list[str]:
    """Bare names of the packaged models or runs."""
    return sorted(file.stem for file in (CONFIG_FOLDER / kind).glob("*.yaml"))


def _missing_file(what: str, kind: FileKind) -> ConfigError:
    return ConfigError(f"{what}: no such file; available {kind}: {', '.join(available(kind)) or 'none'}")


def _find_run(path: str | Path) -> Path:
    given = Path(path)
    candidates = [given, CONFIG_FOLDER / given]
    if given.parts[:1] == (CONFIG_FOLDER.name,):
        candidates.append(CONFIG_FOLDER.parent / given)
    if _is_bare(str(path)):
        candidates.append(CONFIG_FOLDER / "runs" / f"{path}.yaml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise _missing_file(f"run file {path}", "runs")


def _is_bare(name: str) -> bool:
    return "/" not in name and not name.endswith(_SUFFIXES)


def _locate(name: str, kind: FileKind, folder: Path) -> Path:
    return CONFIG_FOLDER / kind / f"{name}.yaml" if _is_bare(name) else folder / name


class _Layer(NamedTuple):
    """A file merged over the files that it extends."""

    data: dict[str, Any]
    names_model: bool
    """Whether one of the files names a model file, so that the model replaces an extended one."""


def _read(file: Path, kind: FileKind, chain: tuple[Path, ...]) -> _Layer:
    """Read ``file`` over what it extends; ``chain`` holds the files that led here, to refuse cycles."""
    identity = file.resolve()
    if identity in chain:
        cycle = " -> ".join(str(link) for link in (*chain[chain.index(identity) :], identity))
        raise ConfigError(f"{file}: extends itself: {cycle}")
    own = _read_mapping(file)
    extends = own.pop("extends", [])
    names_model = False
    if kind == "runs":
        names_model = _fill_model(own, file.parent, str(file))
    layer = _Layer({}, False)
    for name in _names(extends, str(file)):
        base = _locate(name, kind, file.parent)
        if not base.is_file():
            raise _missing_file(f"{file}: extends: {name}", kind)
        layer = _over(layer, _read(base, kind, (*chain, identity)))
    return _over(layer, _Layer(own, names_model))


def _over(base: _Layer, top: _Layer) -> _Layer:
    kept = {key: value for key, value in base.data.items() if not (top.names_model and key == "model")}
    return _Layer(deep_merge(kept, top.data), base.names_model or top.names_model)


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    data = parse_yaml(text, str(file))
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{file}: found {found}; the file must be a mapping of fields")
    return data


def _names(extends: Any, source: str) -> list[str]:
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"{source}: extends: found {json.dumps(extends)}; must be a file or a list of files"
        )
    return names


def _fill_model(data: dict[str, Any], folder: Path, source: str) -> bool:
    """Put the contents of a named model file under ``data["model"]``; returns whether it names one."""
    model = data.get("model")
    if isinstance(model, str):
        model = {"extends": model}
    if not isinstance(model, dict) or "extends" not in model:
        return False
    own = {key: value for key, value in model.items() if key != "extends"}
    filled: dict[str, Any] = {}
    for name in _names(model["extends"], f"{source}: model"):
        file = _locate(name, "models", folder)
        if not file.is_file():
            raise _missing_file(f"{source}: model: {name}", "models")
        filled = deep_merge(filled, _read(file, "models", ()).data)
    data["model"] = deep_merge(filled, own)
    return True


def _apply_override(data: dict[str, Any], override: str) -> None:
    source = f"--set {override!r}"
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{source}: must be NAME=VALUE, for example optimizer.lr=1e-3")
    if keys[-1] == "extends":
        raise ConfigError(f"{source}: files are extended in files only; to replace the model, set model=NAME")
    value = parse_yaml(text, source)
    if keys == ["model"]:
        holder = {"model": value}
        _fill_model(holder, Path(), source)
        value = holder["model"]
    target: Any = data
    for depth, key in enumerate(keys[:-1]):
        target = _step_into(target, key, ".".join(keys[: depth + 1]), source)
    if isinstance(target, list):
        target[_index(target, keys[-1], name, source)] = value
    elif isinstance(target, dict):
        target[keys[-1]] = value
    else:
        raise _not_a_section(".".join(keys[:-1]), target, source)


def _step_into(target: Any, key: str, path: str, source: str) -> Any:
    """The container under ``key``, made where it is missing and copied where YAML aliases could share it."""
    if isinstance(target, list):
        index = _index(target, key, path, source)
        target[index] = copy(target[index])
        return target[index]
    if not isinstance(target, dict):
        raise _not_a_section(path.rpartition(".")[0], target, source)
    target[key] = {} if target.get(key) is None else copy(target[key])
    return target[key]


def _not_a_section(path: str, value: Any, source: str) -> ConfigError:
    return ConfigError(f"{source}: {path}: found {json.dumps(value)}, which has no fields to set")


def _index(items: list[Any], key: str, path: str, source: str) -> int:
    if not key.isascii() or not key.isdigit() or int(key) >= len(items):
        valid = f"0 to {len(items) - 1}" if items else "none, the list is empty"
        raise ConfigError(f"{source}: {path}: found index {key!r}; valid: {valid}")
    return int(key)
