"""Check that all processes of a group can connect with each other, before anything else relies on it.

Plain TCP and the standard library: it is there in a tenth of a second, and names the pair that cannot connect, where a
rendezvous of torch waits in silence. All come to rank 0, which tells everyone where the others listen.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

KNOCK = 5.0  # seconds for one connection; TCP repeats a lost packet after 1 and 3 s
LONGEST = 1 << 20  # bytes of a message; addresses of ten thousand processes
TOGETHER = 32  # connections that are tried at a time


@dataclass(frozen=True)
class Met:
    """What rank 0 knows after a meeting.

    Attributes:
        missing: ranks that did not come, or fell silent.
        unreachable: pairs of ranks that cannot connect.
    """

    missing: list[int]
    unreachable: list[tuple[int, int]]


def meet(rank: int, world: int, host: str, port: int, seconds: float) -> Met | None:
    """Meet the others of a group; all call it within ``seconds``.

    Args:
        rank: of this process.
        world: processes in the group.
        host: address of rank 0.
        port: free port there.
        seconds: to wait for the others, and once more for what they report.

    Returns:
        Of rank 0: what was found. Of the others: None.

    Raises:
        OSError: of rank 0: the port is taken; of the others: rank 0 cannot be reached, or gives no answer.
        ValueError, TypeError, KeyError: of the others: what listens there is not rank 0.
    """
    if rank == 0:
        return _receive(world, port, seconds)
    _visit(rank, world, host, port, seconds)
    return None


def _receive(world: int, port: int, seconds: float) -> Met:
    deadline = time.monotonic() + seconds
    guests: dict[int, _Line] = {}
    unreachable: list[tuple[int, int]] = []
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("", port), backlog=max(128, world)))
        while len(guests) < world - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with suppress(OSError, ValueError, TypeError):  # strangers knock on ports, too
                connection, _ = listener.accept()
                line = stack.enter_context(_Line(connection))
                hello = line.receive(min(KNOCK, seconds))
                if type(hello["rank"]) is int and 0 < hello["rank"] < world and type(hello["port"]) is int:
                    line.port = hello["port"]
                    guests[hello["rank"]] = line
        where = {rank: [line.host, line.port] for rank, line in guests.items()}
        for line in guests.values():
            with suppress(OSError):
                line.send({"where": where})
        deadline = time.monotonic() + seconds
        for rank, line in list(guests.items()):
            try:
                answer = line.receive(max(0.1, deadline - time.monotonic()))
                unreachable += [(rank, int(other)) for other in answer["unreachable"]]
            except (OSError, ValueError, TypeError, KeyError):
                del guests[rank]
        missing = [rank for rank in range(1, world) if rank not in guests]
        for line in guests.values():
            with suppress(OSError):
                line.send({"done": True})
        return Met(missing, unreachable)


def _visit(rank: int, world: int, host: str, port: int, seconds: float) -> None:
    with socket.create_server(("", 0), backlog=max(128, world)) as own, _Line(_knock(host, port, seconds)) as line:
        line.send({"rank": rank, "port": own.getsockname()[1]})
        where: Mapping[str, Any] = line.receive(2 * seconds)["where"]
        later = [(int(other), *address) for other, address in where.items() if int(other) > rank]
        with ThreadPoolExecutor(TOGETHER) as pool:
            reached = pool.map(lambda peer: _reaches(peer[1], peer[2], min(KNOCK, seconds)), later)
            line.send({"unreachable": [peer[0] for peer, well in zip(later, reached, strict=True) if not well]})
        # Keep our port open until everyone has reported: others may still try it.
        line.receive(2 * seconds)


def _knock(host: str, port: int, seconds: float) -> socket.socket:
    """Connect with rank 0, which may not listen yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, min(KNOCK, deadline - time.monotonic())))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _reaches(host: str, port: int, seconds: float) -> bool:
    # The system takes connections in by itself; the peer need not do anything for it.
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError:
        return False
    return True


class _Line:
    """A connection that carries JSON objects, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._file = connection, connection.makefile("rb")
        self.host: str = connection.getpeername()[0]
        self.port = 0

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, message: Mapping[str, object]) -> None:
        self._socket.settimeout(KNOCK)
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next message.

        Raises:
            OSError: none comes within ``seconds`` of silence, or the other has gone.
            ValueError, TypeError: it is no JSON object.
        """
        self._socket.settimeout(seconds)
        line = self._file.readline(LONGEST)
        if not line:
            raise OSError("the other end has gone")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise TypeError("no object")
        return message
