from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rxt_dist.observe.metrics import TrainMetrics

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
RULE_FILES = sorted((MONITORING / "rules").glob("*.yml"))
RULE_TESTS = sorted((MONITORING / "rules" / "tests").glob("*.yml"))


def alerts() -> dict[str, dict[str, Any]]:
    return {
        rule["alert"]: rule
        for path in RULE_FILES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    }


def exported_names() -> set[str]:
    """Names of all series a scrape can show; a label name of an enum equals its metric's name."""
    names = set()
    for family in TrainMetrics().registry.collect():
        names |= {family.name, *(sample.name for sample in family.samples)}
    return names


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not on PATH; Debian and Ubuntu have it in the package prometheus")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_unit_tests() -> None:
    assert RULE_TESTS
    promtool("test", "rules", *RULE_TESTS)


def test_promtool_accepts_rules_and_configuration() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)
    promtool("check", "config", MONITORING / "prometheus.yml")


def test_rules_only_use_metrics_that_exist() -> None:
    names = exported_names()
    used = {name for rule in alerts().values() for name in re.findall(r"\brxt_\w+", rule["expr"])}
    assert used
    assert used <= names, f"not exported: {sorted(used - names)}"


def test_unit_tests_only_feed_metrics_that_exist() -> None:
    names = exported_names()
    fed = {
        name
        for path in RULE_TESTS
        for case in yaml.safe_load(path.read_text())["tests"]
        for series in case["input_series"]
        for name in re.findall(r"^rxt_\w+", series["series"])
    }
    assert fed
    assert fed <= names, f"not exported: {sorted(fed - names)}"


def test_every_alert_has_a_firing_and_a_quiet_case() -> None:
    fired: dict[str, set[bool]] = {}
    for path in RULE_TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                fired.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert fired.keys() == alerts().keys()
    assert all(outcomes == {True, False} for outcomes in fired.values()), fired


@pytest.mark.parametrize("name", sorted(alerts()))
def test_every_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description"}


def test_example_targets_have_the_labels_that_the_rules_group_by() -> None:
    for path in (MONITORING / "targets").glob("*.json"):
        for target in json.loads(path.read_text()):
            assert target["labels"].keys() == {"run_id", "node", "local_rank"}
