"""The HTTP endpoint that Prometheus reads: one a process, started on a port of its own."""

from __future__ import annotations

import errno
import logging
import socket
from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from rxt_dist.observe.metrics import TrainMetrics

_logger = logging.getLogger(__name__)

PORT_TRIES = 32
_HIGHEST_PORT = 65535
_ANY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Exporter:
    """A running endpoint.

    Attributes:
        url: where the metrics are read, ``http://HOST:PORT/metrics``.
        port: the port it listens on.
    """

    url: str
    port: int
    _server: WSGIServer
    _thread: Thread

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_exporter(
    metrics: TrainMetrics, host: str = "127.0.0.1", base_port: int = 9400, local_rank: int = 0
) -> Exporter | None:
    """Serve the metrics of this process on ``base_port + local_rank``, or on the next free port.

    Monitoring must never stop training: whatever goes wrong here is one warning, and the result is None.

    Args:
        metrics: what to serve.
        host: address to listen on. Anyone who reaches it can read the metrics, so the default is this
            machine only.
        base_port: port of local rank 0.
        local_rank: rank of this process on its node.
    """
    wanted = base_port + local_rank
    ports = range(wanted, min(wanted + PORT_TRIES, _HIGHEST_PORT + 1))
    reason: Exception | str = f"ports end at {_HIGHEST_PORT}"
    for port in ports:
        try:
            server, thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            reason = error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
        except Exception as error:
            reason = error
            break
        else:
            if port != wanted:
                _logger.warning("metrics port %d is busy, using %d", wanted, port)
            return Exporter(url=_url(host, port), port=port, _server=server, _thread=thread)
    _logger.warning(
        "no metrics endpoint on %s, port %d (%d tries): %s; training goes on without it",
        host,
        wanted,
        PORT_TRIES,
        reason,
    )
    return None


def _url(host: str, port: int) -> str:
    name = socket.gethostname() if host in _ANY_ADDRESS else host
    return f"http://[{name}]:{port}/metrics" if ":" in name else f"http://{name}:{port}/metrics"
