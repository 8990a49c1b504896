"""What the ways to a shard (http, object stores, pipes) have in common: a stream of bytes, and two kinds of failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CHUNK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Patience:
    """How long a shard is waited for, and how often it is tried. Times in seconds.

    A cluster's network has faults of seconds, a store that throttles of a minute: six tries span about half a minute.
    """

    connect: float = 10.0
    read: float = 60.0  # without a byte
    slowest: float = 4096.0  # bytes per second on average over `read` seconds; below, the stream is taken as stuck
    tries: int = 6  # failures in a row without progress
    first_wait: float = 1.0  # doubles with each failure, with jitter, so that nodes do not come back at one moment
    longest_wait: float = 60.0  # bounds the doubling and what a server asks for with Retry-After


@dataclass(frozen=True)
class Stream:
    """The bytes of one try.

    Attributes:
        start: where in the object they begin: the offset that was asked for if the object is for certain the same one
            as before, otherwise 0.
        length: bytes of the whole object, or None where the source does not say.
        identity: changes whenever the object does; None where the source gives nothing to tell it by.
        chunks: the bytes; raises :class:`Interrupted` when they break off.
    """

    start: int
    length: int | None
    identity: str | None
    chunks: Iterator[bytes]


class Refused(Exception):
    """Trying again would not help."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class Interrupted(Exception):
    """Trying again may help: after ``wait`` seconds if the source asked for that, from the first byte if ``anew``."""

    def __init__(self, reason: str, *, wait: float | None = None, anew: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.anew = anew
