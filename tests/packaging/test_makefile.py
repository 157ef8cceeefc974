from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = (REPOSITORY / "constraints-cpu.txt").read_text()

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not on PATH")


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without what a ``make test`` around it was called with."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "VENV", "PYTHON")
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in outer},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@needs_make
def test_make_alone_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make ([a-z-]+)", run_make(REPOSITORY).stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony.group(1).split())


@needs_make
def test_old_python_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    old_python = tmp_path / "old-python"
    old_python.write_text("#!/bin/sh\nexit 1\n")
    old_python.chmod(0o755)
    result = run_make(tmp_path, "setup", f"PYTHON={old_python}")
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert str(old_python) in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_constraints_pin_every_direct_dependency_inside_its_range() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.lower().replace("_", "-"), re.MULTILINE))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["test"], *extras["prep"], *extras["monitoring"]]
    for requirement in map(Requirement, lines):
        pin = pins.get(requirement.name.lower().replace("_", "-"))
        assert pin is not None, f"{requirement.name} is not in constraints-cpu.txt"
        assert requirement.specifier.contains(pin), f"{requirement.name}=={pin} is outside {requirement}"


def test_constraints_have_only_exact_versions() -> None:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
