from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGED_FOLDERS = ("rxt_dist", "data_prep", "launch", "configs", "monitoring")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this tree, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def metadata_file(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}")]
        return archive.read(member).decode()


@pytest.mark.parametrize("folder", PACKAGED_FOLDERS)
def test_wheel_holds_every_file_of_its_packages(wheel: Path, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(f"{folder}/")}
    source = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix in {".py", ".yaml", ".yml", ".json", ".txt", ".gz"}
    }
    assert source
    assert packed >= source, f"missing: {sorted(source - packed)}"


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top_level = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == set(PACKAGED_FOLDERS)


def test_commands_point_at_functions_of_the_wheel(wheel: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(metadata_file(wheel, "entry_points.txt"))
    commands = dict(parser["console_scripts"])
    assert commands.keys() == {"rxt", "rxt-data"}
    with zipfile.ZipFile(wheel) as archive:
        for target in commands.values():
            module, function = target.split(":")
            source = archive.read(module.replace(".", "/") + ".py").decode()
            assert f"def {function}(" in source


def test_metadata_names_licence_and_extras(wheel: Path) -> None:
    metadata = metadata_file(wheel, "METADATA")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    for extra in ("cuda", "prep", "monitoring", "test"):
        assert f"Provides-Extra: {extra}\n" in metadata
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
