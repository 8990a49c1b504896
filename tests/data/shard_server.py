"""Serve bytes over HTTP with ranges and ETags, and fail in the ways that real servers do."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler", bytes], None]


class ShardServer(ThreadingHTTPServer):
    """``objects``: bytes by path. ``answers``: for a path, what to do with its next requests, one each; then it is well."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str | None]] = []  # path and Range of each request
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: ShardServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        path = self.path.partition("?")[0]
        answers = self.server.answers.get(path, [])
        answer = answers.pop(0) if answers else whole
        answer(self, self.server.objects.get(path, b""))

    def begin(self, status: int, **headers: object) -> None:
        """Send status line and headers; ``Retry_After=1`` is ``Retry-After: 1``."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def cut(self) -> None:
        """End the connection with a reset."""
        self.wfile.flush()
        time.sleep(0.05)  # a reset overtakes bytes that are still on the way
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the client has gone, or the connection was cut on purpose
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()


def etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def part(handler: Handler, body: bytes) -> tuple[int, dict[str, object], bytes]:
    """Return status, headers and bytes of a good server's answer."""
    asked, condition = handler.headers["Range"], handler.headers["If-Range"]
    if asked and condition in (None, etag(body)):
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start >= len(body):
            return 416, {"Content_Range": f"bytes */{len(body)}", "Content_Length": 0}, b""
        rest = body[start:]
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return 206, {"Content_Range": span, "Content_Length": len(rest), "ETag": etag(body)}, rest
    return 200, {"Content_Length": len(body), "ETag": etag(body)}, body


def whole(handler: Handler, body: bytes) -> None:
    """Answer as a good server does; 404 for what it does not have."""
    if not body:
        handler.begin(404, Content_Length=0)
        return
    status, headers, data = part(handler, body)
    handler.begin(status, **headers)
    handler.wfile.write(data)


def cut_after(count: int) -> Answer:
    """Answer well, but reset the connection after ``count`` bytes of the body."""

    def answer(handler: Handler, body: bytes) -> None:
        status, headers, data = part(handler, body)
        handler.begin(status, **headers)
        handler.wfile.write(data[:count])
        handler.cut()

    return answer


def closed_after(count: int) -> Answer:
    """Answer well, but close the connection properly after ``count`` bytes of the body."""

    def answer(handler: Handler, body: bytes) -> None:
        status, headers, data = part(handler, body)
        handler.begin(status, **headers)
        handler.wfile.write(data[:count])

    return answer


def without_length(count: int | None = None) -> Answer:
    """Answer in HTTP/1.0 style: the body ends with the connection, after ``count`` bytes."""

    def answer(handler: Handler, body: bytes) -> None:
        handler.begin(200)
        handler.wfile.write(body[:count])

    return answer


def without_range(count: int | None = None) -> Answer:
    """Answer without ranges and ETags, and reset the connection after ``count`` bytes."""

    def answer(handler: Handler, body: bytes) -> None:
        handler.begin(200, Content_Length=len(body))
        handler.wfile.write(body[:count])
        if count is not None:
            handler.cut()

    return answer


def status(code: int, **headers: object) -> Answer:
    """Answer with an error page."""

    def answer(handler: Handler, body: bytes) -> None:
        handler.begin(code, Content_Length=5, **headers)
        handler.wfile.write(b"error")

    return answer


def trickle(seconds: float) -> Answer:
    """Send a byte now and then, for ``seconds``."""

    def answer(handler: Handler, body: bytes) -> None:
        handler.begin(200, Content_Length=len(body), ETag=etag(body))
        end = time.monotonic() + seconds
        for at in range(len(body)):
            if time.monotonic() > end:
                break
            handler.wfile.write(body[at : at + 1])
            time.sleep(0.02)

    return answer


def silence(seconds: float) -> Answer:
    """Do not answer for ``seconds``."""

    def answer(handler: Handler, body: bytes) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return answer


@contextmanager
def serving() -> Iterator[ShardServer]:
    """Run a server on a free port of this machine."""
    with ShardServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
