"""The Prometheus endpoints of a run in progress."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from helpers.datasets import Datasets
from helpers.launch import Ranks, run_ranks, start_ranks
from helpers.runs import SMALL, arguments, metrics

STEPS = 60
SETTINGS = SMALL | {
    "stages": f"[{{name: joint_lm, steps: {STEPS}}}]",
    "checkpoint.every_steps": 20,
    "metrics.prometheus.enabled": "true",
}


def scrape(port: int) -> dict[str, float] | None:
    """Samples of an endpoint by name with labels; None while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as response:
            text = response.read().decode()
    except (urllib.error.URLError, OSError):
        return None
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def consecutive_ports(count: int) -> int:
    """The first of ``count`` free ports in a row."""
    for base in range(21000, 60000, 37):
        try:
            with closing(socket.socket()) as first:
                first.bind(("127.0.0.1", base))
            for port in range(base + 1, base + count):
                with closing(socket.socket()) as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


def watch(ranks: Ranks, ports: range, expected: int) -> dict[int, list[dict[str, float]]]:
    """All scrapes of the ports that answer, until ``expected`` of them have shown steps or the run ends."""
    seen: dict[int, list[dict[str, float]]] = {}
    while ranks.alive():
        for port in ports:
            samples = scrape(port)
            if samples is not None:
                seen.setdefault(port, []).append(samples)
        moving = [port for port, found in seen.items() if found[-1]["rxt_train_step"] >= STEPS // 2]
        if len(moving) == expected:
            break
        time.sleep(0.01)
    return seen


@pytest.fixture
def busy() -> Iterator[socket.socket]:
    """A listening socket with free ports after it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", consecutive_ports(6)))
    listener.listen()
    yield listener
    listener.close()


def test_every_rank_shows_the_step_while_it_trains(
    datasets: Datasets, tmp_path: Path, busy: socket.socket
) -> None:
    """The first port is taken, so that both ranks move on to the next free ones, and say so."""
    base = busy.getsockname()[1]
    settings = SETTINGS | {"metrics.prometheus.base_port": base}
    with start_ranks(2, arguments(datasets, "run", settings), tmp_path) as ranks:
        seen = watch(ranks, range(base + 1, base + 6), 2)
        result = ranks.wait().check()
    assert len(seen) == 2, (seen.keys(), result.output)
    assert f"metrics port {base} is busy" in result.output
    logged = {record["step"]: record for record in metrics(tmp_path / "run")}
    for scrapes in seen.values():
        steps = [found["rxt_train_step"] for found in scrapes]
        assert steps == sorted(steps)
        last = scrapes[-1]
        step = int(last["rxt_train_step"])
        assert STEPS // 2 <= step <= STEPS
        assert last["rxt_train_tokens_total"] == logged[step]["total_tokens"]
        assert last["rxt_checkpoint_last_step"] in (20.0, 40.0, 60.0)
        assert any(found['rxt_train_state{rxt_train_state="training"}'] == 1.0 for found in scrapes)
        losses = {
            component: value
            for name, value in last.items()
            if name.startswith("rxt_train_loss{")
            for component in [name.split('"')[1]]
        }
        assert losses.keys() == {"loss", "mlm_loss", "ar_loss", "aux_loss"}
        # A scrape can fall between the losses and the step of one optimizer step.
        near = [logged[s]["loss"] for s in (step, step + 1) if s in logged]
        assert any(losses["loss"] == pytest.approx(value) for value in near)


def test_no_endpoint_is_a_warning_and_no_reason_to_stop(datasets: Datasets, tmp_path: Path) -> None:
    settings = SETTINGS | {
        "stages": "[{name: joint_lm, steps: 2}]",
        "metrics.prometheus.host": "203.0.113.7",  # an address this machine does not have
    }
    result = run_ranks(1, arguments(datasets, "run", settings), tmp_path).check()
    assert "no metrics endpoint on 203.0.113.7" in result.output
    assert len(metrics(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
