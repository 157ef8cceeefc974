from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from rxt_dist.config import RunConfig, StageConfig
from rxt_dist.config.describe import configuration_table
from rxt_dist.config.stage import STAGE_DATA

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "configuration-fields.md"
REGENERATE = "python -m rxt_dist.config.describe > docs/configuration-fields.md"


def rows(section: str) -> dict[str, list[str]]:
    """Cells after the first of every row in the table of ``section``, by field."""
    _, _, rest = configuration_table().partition(f"\n## {section}\n")
    body = rest.partition("\n## ")[0]
    cells = [line[2:-2].split(" | ") for line in body.splitlines() if line.startswith("| `")]
    return {name.strip("`"): others for name, *others in cells}


def described(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """``model`` and the sections below it."""
    yield model
    for field in model.model_fields.values():
        pending = [field.annotation]
        while pending:
            annotation = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from described(annotation)
            pending += getattr(annotation, "__args__", ())


def test_the_committed_page_is_the_generated_one() -> None:
    same = PAGE.read_text(encoding="utf-8") == configuration_table()
    assert same, f"{PAGE.name} does not match the schema; make it anew with: {REGENERATE}"


def test_every_field_is_described() -> None:
    for section in set(described(RunConfig)):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"


@pytest.mark.parametrize(
    ("section", "field", "value", "default"),
    [
        ("The run", "seed", "integer (from 0, below 9223372036854775808)", "`0`"),
        ("The run", "stages", "list of: section (at least 1)", "required"),
        ("`model`", "vocab_size", "integer (from 8) or `auto`", "`auto`"),
        ("`model.memory_attention.gate`", "bias_init", "number or `null`", "`null`"),
        ("`stages.N`", "frozen", "list of: `encoder`, `decoder`, `memory_attention`", "`[]`"),
        ("`optimizer`", "betas", "list of 2: number (from 0, below 1) each", "`[0.9, 0.999]`"),
        ("`zero`", "overlap_comm", "`true` or `false`", "`true`"),
        ("`data`", "text", "path or URL or list of: section (at least 1) or `null`", "`null`"),
        ("`runtime`", "attention_backend", "`auto`, `triton`, `flash`, `varlen`, `sdpa`", "`auto`"),
    ],
)
def test_types_ranges_and_defaults_are_in_words(section: str, field: str, value: str, default: str) -> None:
    assert rows(section)[field][:2] == [value, default]


def test_a_section_used_in_several_places_is_listed_once() -> None:
    table = configuration_table()
    assert table.count("| `query_heads` |") == 1
    assert "`model.decoder.cross_attention`" in table


@pytest.mark.parametrize("name", list(STAGE_DATA))
def test_stages_page_lists_the_options_of_each_stage(name: str) -> None:
    page = (DOCS / "stages.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    body = sections["joint_lm" if name == "interaction_sft" else name]
    listed = {
        option
        for line in body.splitlines()
        if line.startswith("| `")
        for option in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert listed == set(own_options(name))


def own_options(name: str) -> Iterator[str]:
    """Fields that stage ``name`` takes and some other stage refuses, found by trying."""
    numbers = [field for field, info in StageConfig.model_fields.items() if info.annotation is float]
    values = {"components": "encoder", "frozen": ["encoder"], "unfreeze": {"encoder": 4}}
    values |= {"unused_slots": "kept", "system_prompts": True, "window": 3, **dict.fromkeys(numbers, 0.5)}
    for field, value in values.items():
        try:
            StageConfig.model_validate({"name": name, "steps": 9, field: value})
        except ValidationError:
            continue
        yield field
