from __future__ import annotations

import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rxt_dist.observe import exporter as exporter_module
from rxt_dist.observe.exporter import PORT_TRIES, start_exporter
from rxt_dist.observe.metrics import TrainMetrics


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


@pytest.fixture
def busy_port() -> Iterator[int]:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_scrape_shows_the_current_values(free_port: int) -> None:
    metrics = TrainMetrics()
    with closing(start_exporter(metrics, base_port=free_port)) as exporter:
        assert exporter.url == f"http://127.0.0.1:{exporter.port}/metrics"
        assert scrape(exporter.url)["rxt_train_tokens_total"] == 0
        metrics.record_step(3, tokens=64, step_seconds=0.1, data_wait_seconds=0.0)
        scraped = scrape(exporter.url)
    assert scraped["rxt_train_step"] == 3
    assert scraped["rxt_train_tokens_total"] == 64
    assert not [name for name in scraped if name.startswith(("python_", "process_"))]


def test_port_is_base_plus_local_rank(free_port: int) -> None:
    with closing(start_exporter(TrainMetrics(), base_port=free_port - 2, local_rank=2)) as exporter:
        assert exporter.port == free_port


def test_busy_port_moves_to_the_next_free_one(busy_port: int, caplog: pytest.LogCaptureFixture) -> None:
    with closing(start_exporter(TrainMetrics(), base_port=busy_port)) as exporter:
        assert busy_port < exporter.port < busy_port + PORT_TRIES
        assert "rxt_train_step" in scrape(exporter.url)
    assert f"metrics port {busy_port} is busy, using {exporter.port}" in caplog.text


def test_close_frees_the_port_and_can_be_repeated(free_port: int) -> None:
    exporter = start_exporter(TrainMetrics(), base_port=free_port)
    assert exporter is not None
    exporter.close()
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        scrape(exporter.url)
    with closing(start_exporter(TrainMetrics(), base_port=exporter.port)) as again:
        assert again.port == exporter.port


def test_listens_on_this_machine_only_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []

    def record_address(port: int, addr: str, registry: object) -> None:
        addresses.append(addr)
        raise OSError("not started")

    monkeypatch.setattr(exporter_module, "start_http_server", record_address)
    start_exporter(TrainMetrics())
    assert addresses == ["127.0.0.1"]


def test_all_ports_busy_is_a_warning_after_bounded_tries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ports = []

    def always_busy(port: int, addr: str, registry: object) -> None:
        ports.append(port)
        raise OSError(exporter_module.errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(exporter_module, "start_http_server", always_busy)
    assert start_exporter(TrainMetrics(), base_port=9400, local_rank=3) is None
    assert ports == list(range(9403, 9403 + PORT_TRIES))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "training goes on" in record.getMessage()


@pytest.mark.parametrize(
    ("host", "base_port"),
    [
        ("127.0.0.1", 65536),
        ("127.0.0.1", -5),
        ("no-such-host.invalid", 9400),
        ("x" * 300, 9400),
        # An address of the documentation range: never one of this machine.
        ("192.0.2.1", 9400),
    ],
)
def test_impossible_address_is_one_warning(
    host: str, base_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert start_exporter(TrainMetrics(), host=host, base_port=base_port) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.1.2.3", "http://10.1.2.3:9400/metrics"),
        ("::1", "http://[::1]:9400/metrics"),
        ("0.0.0.0", f"http://{socket.gethostname()}:9400/metrics"),
    ],
)
def test_url_can_be_opened_from_elsewhere(host: str, expected: str) -> None:
    assert exporter_module._url(host, 9400) == expected
