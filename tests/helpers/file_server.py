"""A web server over a folder that fails in the ways servers do."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer:
    """What is served, what was asked for, and what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.requests: Counter[str] = Counter()
        """Requests by path, without the query."""
        self.queries: set[str] = set()
        self.most_at_once = 0
        self.seconds = 0.0
        """How long every answer takes."""
        self.change: Callable[[str, int, bytes], bytes] | None = None
        """Makes of (path, number of the request, content) what is sent."""
        self.status: Callable[[str, int], int] = lambda path, number: 200
        self.sent: Callable[[str, int], int | None] = lambda path, number: None
        """How many bytes are sent of the announced ones before the connection ends; None: all."""
        self.stall_after: Callable[[str], int | None] = lambda path: None
        """After how many bytes the server says nothing more, until :meth:`go_on`; None: never."""
        self.stalled = threading.Event()
        """Set when an answer has stalled."""
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._busy = 0

    def go_on(self) -> None:
        """Let stalled answers end."""
        self._released.set()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.strip("/").partition("?")
        with self._lock:
            self.requests[path] += 1
            self.queries.add(query)
            number = self.requests[path]
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)
        try:
            time.sleep(self.seconds)
            self._send(handler, path, number)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        finally:
            with self._lock:
                self._busy -= 1

    def _send(self, handler: BaseHTTPRequestHandler, path: str, number: int) -> None:
        status, file = self.status(path, number), self.folder / path
        if status != 200 or not file.is_file():
            handler.send_error(404 if status == 200 else status)
            return
        content = file.read_bytes()
        if self.change is not None:
            content = self.change(path, number, content)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        stall = self.stall_after(path)
        if stall is not None:
            handler.wfile.write(content[:stall])
            handler.wfile.flush()
            self.stalled.set()
            self._released.wait(30)
            content = content[stall:]
        handler.wfile.write(content[: self.sent(path, number)])


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, *arguments: Any, server_of: FileServer) -> None:
        self.server_of = server_of
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.server_of.answer(self)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    """Serve ``folder`` on a port of this machine."""
    files = FileServer(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, server_of=files)) as server:
        server.daemon_threads = True
        files.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield files
        finally:
            files.go_on()
            server.shutdown()
            thread.join()
