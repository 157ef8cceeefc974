from __future__ import annotations

import re
from pathlib import Path

import pytest

from rxt_dist.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_the_run_file_of_the_readme_is_valid(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    run_file = tmp_path / "mine.yaml"
    run_file.write_text(example)
    config = load_config(run_file, require_data=False)
    assert config.batch.packs == 16
    assert [stage.steps for stage in config.stages] == [2000, 500, 200, 1300]
    assert config.model.name == "rxt-tiny"


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= mentioned <= targets


def test_the_run_files_of_the_readme_exist() -> None:
    mentioned = re.findall(r"configs/\w+/[\w-]+\.yaml", README)
    assert mentioned
    assert [name for name in mentioned if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        file, _, section = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert section in {heading.lower().replace("`", "").replace(" ", "-") for heading in headings}, (
                link
            )
