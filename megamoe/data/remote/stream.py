"""Define what all sources of shards (http, object stores, pipes) share: a stream of bytes and two kinds of failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CHUNK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Patience:
    """How long to wait for a shard and how often to try. Times in seconds.

    Faults of a cluster's network last seconds, throttling of a store a minute: six tries span about half a minute.
    """

    connect: float = 10.0
    read: float = 60.0  # longest wait for the next byte
    slowest: float = 4096.0  # minimum bytes per second, averaged over `read` seconds; a slower stream is interrupted
    tries: int = 6  # failures in a row without progress
    first_wait: float = 1.0  # doubles with each failure, with jitter, so that nodes do not retry at the same moment
    longest_wait: float = 60.0  # upper bound of the doubling and of a server's Retry-After


@dataclass(frozen=True)
class Stream:
    """The bytes of one try.

    Attributes:
        start: their offset in the object: the requested one if the object is certainly the same as before, otherwise 0.
        length: bytes of the whole object, or None if the source does not say.
        identity: changes whenever the object does; None if the source offers nothing to identify it by.
        chunks: the bytes; raises :class:`Interrupted` when they break off.
    """

    start: int
    length: int | None
    identity: str | None
    chunks: Iterator[bytes]


class Refused(Exception):
    """A failure that another try would not fix."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class Interrupted(Exception):
    """A failure that another try may fix: after ``wait`` seconds if the source asks so, from the first byte if ``anew``."""

    def __init__(self, reason: str, *, wait: float | None = None, anew: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.anew = anew
