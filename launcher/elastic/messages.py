"""Messages between the supervisor and its agents: JSON objects, one per line, over TCP, bounded in size.

Both sides prove that they know the run's token, which never crosses the network: each sends a nonce and gets an HMAC of
it back. What follows is neither encrypted nor signed: it keeps out strangers, not somebody who controls the network.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

LONGEST = 1 << 16  # bytes of a message; the largest are pieces of rank 0's output
BEAT = 1.0  # seconds between signs of life, in both directions
SENDING = 5.0  # seconds; a peer that takes in nothing for so long is as good as gone

Message = dict[str, Any]


class Wire:
    """One end of a connection. Any thread may send. An error closes the connection; nothing is raised.

    Attributes:
        addresses: IP addresses of this end and of the other.
        closed: why nothing more comes; empty while it is open.
        heard: time (monotonic) of the last message.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SENDING)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed = ""
        self.heard = time.monotonic()
        self.addresses: tuple[str, str] = connection.getsockname()[0], connection.getpeername()[0]
        self._socket, self._lock, self._received = connection, threading.Lock(), b""
        self._unread: list[Message] = []

    def fileno(self) -> int:
        """Return the file descriptor for ``select``; -1 after the end."""
        return self._socket.fileno()

    def send(self, verb: str, **fields: object) -> None:
        """Send a message."""
        line = json.dumps({"verb": verb, **fields}).encode() + b"\n"
        assert len(line) <= LONGEST, f"{verb}: a message of {len(line)} bytes"
        with self._lock:
            if not self.closed:
                try:
                    self._socket.sendall(line)
                except OSError as error:
                    self.close(f"cannot be written to ({error})")

    def receive(self, seconds: float) -> list[Message]:
        """Return the messages that are there or come within ``seconds``; there may be none."""
        if not self._unread:
            self._read(seconds)
        messages, self._unread = self._unread, []
        return messages

    def first(self, seconds: float) -> Message | None:
        """Return the next message alone; None when none comes within ``seconds``."""
        if not self._unread:
            self._read(seconds)
        return self._unread.pop(0) if self._unread else None

    def _read(self, seconds: float) -> None:
        if self.closed:
            return
        try:
            if not select.select([self._socket], [], [], seconds)[0]:
                return
            data = self._socket.recv(1 << 16)
        except (OSError, ValueError) as error:
            self.close(f"cannot be read from ({error})")
            return
        if not data:
            self.close("closed its connection")
            return
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > LONGEST:
            self.close("sent a message that is too long")
        for line in lines:
            try:
                message = json.loads(line)
                if not isinstance(message["verb"], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                self.close("sent what is no message")
                return
            self._unread.append(message)
            self.heard = time.monotonic()

    def close(self, why: str) -> None:
        """End the connection; the first reason stays."""
        self.closed = self.closed or why
        self._socket.close()


def proof(token: str, side: str, nonce: str) -> str:
    """Compute the proof that ``side`` (agent, supervisor) knows the token."""
    return hmac.new(token.encode(), f"{side}:{nonce}".encode(), hashlib.sha256).hexdigest()


def proves(message: Mapping[str, Any], token: str, side: str, nonce: str) -> bool:
    """Check the proof of ``side`` in ``message``, in constant time."""
    given = message.get("proof")
    return isinstance(given, str) and hmac.compare_digest(given.encode(), proof(token, side, nonce).encode())


def new_nonce() -> str:
    """Make a number that was never used before; also good as a token."""
    return secrets.token_hex(32)
