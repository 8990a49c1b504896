"""Download a shard completely despite interruptions, or raise an error that says why not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

from megamoe.core.errors import DataError
from megamoe.core.retry import Backoff
from megamoe.core.urls import masked, scheme
from megamoe.data.remote.stream import Interrupted, Patience, Refused, Stream
from megamoe.data.shards.tar import BLOCK, checksum_is_right

Open = Callable[[str, int, str | None, Patience], AbstractContextManager[Stream]]
_PROGRESS = 1 << 20  # bytes further than ever before make a connection that breaks again and again worth going on with


class ShardUnavailable(DataError):
    """A shard is not available: it does not exist, access is denied, or its source failed too often."""


@dataclass(frozen=True)
class Download:
    """The result and the cost of a download.

    Attributes:
        size: bytes of the shard.
        identity: changes whenever the object does (ETag, or date and length); None if the source gives neither.
        received: bytes received, including those received twice.
        retries: failures that a further try made good.
    """

    size: int
    identity: str | None
    received: int
    retries: int


def download(url: str, file: BinaryIO, patience: Patience | None = None, largest: int | None = None) -> Download:
    """Write the shard ``url`` into ``file``, which is empty and open for reading and writing.

    A broken stream resumes at its byte if the source can prove that the object is still the same; otherwise it starts
    over. The bytes received are compared with the length that the source stated. If it stated none (pipes, some web
    servers), a tar without its end mark counts as broken off.

    Args:
        url: ``http(s)://``, ``pipe:COMMAND`` or any URL of fsspec.
        file: receives the bytes; not closed.
        patience: timeouts and retries.
        largest: maximum size in bytes; a larger shard is refused.

    Raises:
        ShardUnavailable: after too many failures, or at once if another try cannot help.
        DataError: larger than ``largest``.
        OSError: ``file`` cannot be written.
    """
    return _Attempts(url, file, patience or Patience(), largest).run()


def opener(url: str) -> Open:
    """Return the function that opens ``url``. It is imported on use: reading local shards needs none of the packages."""
    kind = scheme(url)
    if kind in ("http", "https"):
        from megamoe.data.remote.http import open_http

        return open_http
    if kind == "pipe":
        from megamoe.data.remote.pipe import open_pipe

        return open_pipe
    from megamoe.data.remote.object_store import open_object

    return open_object


class _Attempts:
    def __init__(self, url: str, file: BinaryIO, patience: Patience, largest: int | None) -> None:
        self._url = url
        self._open = opener(url)
        self._file = file
        self._patience = patience
        self._largest = largest
        self._written = 0
        self._furthest = 0  # bytes held at the last time that there was progress
        self._identity: str | None = None
        self._length: int | None = None
        self._received = 0
        self._failures = 0  # since then
        self._retries = 0

    def run(self) -> Download:
        while True:
            try:
                self._try()
                return Download(self._written, self._identity, self._received, self._retries)
            except Refused as refused:
                raise self._unavailable(refused.reason, refused.remedy) from refused
            except Interrupted as interrupted:
                self._failures += 1
                if interrupted.anew:
                    self._identity = None
                if self._failures >= self._patience.tries:
                    remedy = "check that its source is up and reachable, then start again"
                    raise self._unavailable(interrupted.reason, remedy) from interrupted
                time.sleep(self._pause(interrupted.wait))
                self._retries += 1

    def _try(self) -> None:
        offset = self._written if self._identity is not None else 0
        with self._open(self._url, offset, self._identity, self._patience) as stream:
            if stream.start and stream.length != self._length:
                raise Interrupted("its length changed while it was read", anew=True)
            if stream.start != self._written:
                self._file.seek(0)
                self._file.truncate()
                self._written = 0
            self._identity, self._length = stream.identity, stream.length
            self._check_size(stream.length or 0)
            self._copy(stream)
        self._file.flush()
        if self._length is None:
            if self._looks_cut():
                raise Interrupted(f"broken off after {self._written} bytes, without the end mark of a tar", anew=True)
        elif self._written != self._length:
            raise Interrupted(f"broken off after {self._written} of {self._length} bytes")

    def _copy(self, stream: Stream) -> None:
        since, came = time.monotonic(), 0
        for chunk in stream.chunks:
            self._file.write(chunk)
            self._written += len(chunk)
            self._received += len(chunk)
            self._check_size(self._written)
            if self._written - self._furthest >= _PROGRESS:
                self._furthest, self._failures = self._written, 0
            came += len(chunk)
            spent = time.monotonic() - since
            if spent >= self._patience.read:
                if came < self._patience.slowest * spent:
                    raise Interrupted(f"only {came} bytes came in {spent:.0f} s")
                since, came = time.monotonic(), 0

    def _check_size(self, size: int) -> None:
        if self._largest is not None and size > self._largest:
            raise DataError(
                f"shard {masked(self._url)}: has {size} bytes or more, and {self._largest} are allowed; "
                "allow a larger cache or write smaller shards"
            )

    def _looks_cut(self) -> bool:
        """Whether it is empty, or begins as a tar and does not end as one; what is no tar is the reader's to say."""
        if not self._written:
            return True
        self._file.seek(0)
        if not checksum_is_right(self._file.read(BLOCK).ljust(BLOCK)):
            return False
        self._file.seek(-min(2 * BLOCK, self._written), os.SEEK_END)
        return self._file.read() != bytes(2 * BLOCK)

    def _pause(self, asked: float | None) -> float:
        backoff = Backoff(self._patience.first_wait, self._patience.longest_wait, jitter=0.5)
        return backoff.wait(self._failures, asked or 0.0)

    def _unavailable(self, reason: str, remedy: str) -> ShardUnavailable:
        tries = self._retries + 1
        count = "1 try" if tries == 1 else f"{tries} tries"
        return ShardUnavailable(f"shard {masked(self._url)}: cannot be had, {count} ({reason}); {remedy}")
