"""Serve pictures with faults, for downloads: the path selects the answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.data.shard_factory import jpeg


class ImageServer(ThreadingHTTPServer):
    """``/good/N.jpg`` is a picture; the other paths are those of :meth:`_Handler.do_GET`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up: they are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ImageServer

    def do_GET(self) -> None:
        server, path = self.server, self.path
        with server.lock:
            server.asked[path] += 1
            server.agents.add(self.headers["User-Agent"])
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            tries = server.asked[path]
        try:
            self._answer(path.split("/")[1], path, tries)
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self, what: str, path: str, tries: int) -> None:
        match what:
            case "good" | "slow":
                time.sleep(0.05 if what == "slow" else 0)
                self._send(jpeg(int(path.split("/")[2].split(".")[0])))
            case "flaky":
                self._send(jpeg(1)) if tries > 1 else self._send(b"", 500)
            case "patient":
                self._send(jpeg(1)) if tries > 1 else self._send(b"", 429, {"Retry-After": "1"})
            case "hang":
                time.sleep(1.5)
            case "drip":
                self._send(jpeg(1), drip=True)
            case "chunked":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                body = jpeg(1)
                for piece in (body[:100], body[100:], b""):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            case "cut":
                self._send(jpeg(1)[:100], length=len(jpeg(1)))
            case "noai":
                self._send(jpeg(1), headers={"X-Robots-Tag": "all, NoAI"})
            case "othernoai":
                self._send(jpeg(1), headers={"X-Robots-Tag": "someoneelse: noai"})
            case "html":
                self._send(b"<!doctype html><title>gone</title>", headers={"Content-Type": "image/jpeg"})
            case "huge":
                self._send(bytes(1 << 20))
            case "endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(bytes(1 << 16))
            case "loop":
                self._send(b"", 302, {"Location": "/loop/again"})
            case "moved":
                self._send(b"", 301, {"Location": "../good/5.jpg"})
            case "file":
                self._send(b"", 302, {"Location": "file:///etc/passwd"})
            case "garbage":
                self.wfile.write(b"\x00\xff this is not HTTP\r\n\r\n")
                self.close_connection = True
            case _:
                self._send(b"not here", 404)

    def _send(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        length: int | None = None,
        drip: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        for piece in (body[n : n + 1] for n in range(len(body))) if drip else (body,):
            self.wfile.write(piece)
            time.sleep(0.1 if drip else 0)
        self.close_connection = length is not None

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def serving() -> Iterator[ImageServer]:
    """Run a server on a free port until the block ends."""
    server = ImageServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
