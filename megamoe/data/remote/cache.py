"""Cache remote shards on a local disk, shared by all processes of a node."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file
from megamoe.core.urls import masked, unsigned
from megamoe.data.remote.download import Download, download
from megamoe.data.remote.stream import Patience

_FULL = (errno.ENOSPC, errno.EDQUOT)
_POLL = 0.02  # seconds between looks at a lock that another process holds


@dataclass(frozen=True)
class Fetched:
    """A shard on the local disk, and the cost of fetching it.

    Attributes:
        path: the local file.
        size: its bytes.
        identity: changes whenever the object does: ETag, date and length, or a hash of the bytes.
        since: when it was fetched, in seconds since the epoch.
        hit: whether it was cached already, or another process fetched it meanwhile.
        retries: failures that a further try made good.
        received: bytes received over the network, including those received twice.
        seconds: duration of this call.
    """

    path: Path
    size: int
    identity: str
    since: float
    hit: bool
    retries: int
    received: int
    seconds: float


class CacheUnusable(DataError):
    """The cache itself cannot be written or read, so no shard can be fetched."""


class ShardCache:
    """Keep shards under the hash of their whole URL without its signature, so that equal file names never mix.

    One process of the node downloads a shard; the others that need it wait. Locks belong to the kernel (``flock``), so
    the lock of a dead process is free at once. For the same reason ``folder`` must be on a disk of the node, not on a
    network file system.

    The source is never asked whether a cached shard is still the same: see :meth:`forget`. Above ``limit_bytes`` the
    least recently used shards are removed. The limit does not count downloads in progress, nor removed shards that are
    still open: on POSIX they stay readable, and take space, until they are closed.

    ``KEY.tar`` exists if and only if it is complete: it gets this name when its bytes are on the disk. ``KEY.json``
    beside it describes it. ``KEY.part``, left behind by a killed process, is removed.
    """

    def __init__(self, folder: Path, limit_bytes: int | None, patience: Patience | None = None) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._patience = patience or Patience()

    def open(self, url: str) -> tuple[BinaryIO, Fetched]:
        """Open the shard for reading and download it first if necessary. While open, it stays readable despite the limit.

        Raises:
            ShardUnavailable: it is not available.
            CacheUnusable: the cache cannot be written, or its disk is full.
            DataError: the shard is larger than the limit.
        """
        started = time.monotonic()
        key = _key(url)
        try:
            with self._lock(key):
                cost = None
                file = self._cached(key)
                if file is None:
                    cost = self._download(url, key)
                    file = open(self._path(key, "tar"), "rb")  # noqa: SIM115 (the caller's)
                about = self._about(key)
        except OSError as error:
            raise CacheUnusable(self._unusable(url, error)) from error
        seconds = time.monotonic() - started
        return file, Fetched(
            path=self._path(key, "tar"),
            size=about["size"],
            identity=about["identity"],
            since=about["fetched"],
            hit=cost is None,
            retries=cost.retries if cost else 0,
            received=cost.received if cost else 0,
            seconds=seconds,
        )

    def forget(self, url: str, since: float | None = None) -> None:
        """Remove the shard, whose bytes are damaged or old, so that the next :meth:`open` downloads it again.

        ``since``: remove only the copy fetched at that time. Another process may have fetched a new one.
        """
        key = _key(url)
        try:
            with self._lock(key):
                if since is None or self._about(key).get("fetched") == since:
                    self._remove(key)
        except OSError as error:
            raise CacheUnusable(self._unusable(url, error)) from error

    def _about(self, key: str) -> dict[str, Any]:
        """Return the description of a cached shard; empty if it is missing or damaged."""
        try:
            about = json.loads(self._path(key, "json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return about if {"size", "identity", "fetched"} <= about.keys() else {}

    def _cached(self, key: str) -> BinaryIO | None:
        """Open the shard if it is cached and complete, and mark it as just used."""
        about = self._path(key, "json")
        try:
            file = open(self._path(key, "tar"), "rb")  # noqa: SIM115 (returned)
        except FileNotFoundError:
            return None
        with ExitStack() as stack:
            stack.enter_context(file)
            # A process may have died between writing the two files.
            if self._about(key).get("size") != os.fstat(file.fileno()).st_size:
                return None
            _touch(about)
            stack.pop_all()
        return file

    def _download(self, url: str, key: str) -> Download:
        self._remove(key)
        part = self._path(key, "part")
        try:
            with open(part, "w+b") as file:
                done = download(url, file, self._patience, self.limit_bytes)
                identity = done.identity or _hash(file)
                file.flush()
                os.fsync(file.fileno())
            # One process at a time, or each would count on the same free space.
            with self._lock("room"):
                self._make_room(key, done.size)
                os.replace(part, self._path(key, "tar"))
                about = {"shard": masked(url), "size": done.size, "identity": identity, "fetched": time.time()}
                with atomic_file(self._path(key, "json")) as beside:
                    beside.write(json.dumps(about).encode())
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return done

    def _make_room(self, key: str, size: int) -> None:
        """Remove leftovers of dead processes, and the least recently used shards until ``size`` more bytes fit."""
        found: dict[str, dict[str, os.stat_result]] = {}
        for item in os.scandir(self.folder):
            name, _, suffix = item.name.partition(".")
            if suffix in ("tar", "json", "part") and name != key:
                try:
                    found.setdefault(name, {})[suffix] = item.stat()
                except FileNotFoundError:
                    continue  # another download has just ended
        whole = {name: files for name, files in found.items() if {"tar", "json"} <= files.keys()}
        for name in found.keys() - whole.keys():
            self._try_remove(name)
        if self.limit_bytes is None:
            return
        used = sum(files["tar"].st_size for files in whole.values())
        for name, files in sorted(whole.items(), key=lambda each: each[1]["json"].st_mtime_ns):
            if used + size <= self.limit_bytes:
                return
            if self._try_remove(name):
                used -= files["tar"].st_size

    def _try_remove(self, key: str) -> bool:
        """Remove the shard unless a process is downloading or opening it; return whether it was removed."""
        try:
            with self._lock(key, timeout=0):
                self._remove(key)
        except Timeout:
            return False
        return True

    def _remove(self, key: str) -> None:
        for suffix in ("json", "tar", "part"):  # json first: without it a shard does not count
            self._path(key, suffix).unlink(missing_ok=True)

    def _lock(self, key: str, timeout: float = -1) -> AbstractContextManager[object]:
        # Lock files are never removed: unlinking one while another process opens it would give both "the" lock.
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{key}.lock").acquire(timeout, poll_interval=_POLL)

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"

    def _unusable(self, url: str, error: OSError) -> str:
        if error.errno in _FULL:
            return (
                f"shard cache {self.folder}: the disk is full (at {masked(url)}); "
                "free space, set a lower limit for the cache or choose another folder"
            )
        return f"shard cache {self.folder}: cannot be used ({error.strerror or error}); choose a folder that can be written"


def _touch(path: Path) -> None:
    """Mark a file as just used, by our own clock: the kernel's is too coarse to order several uses."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _key(url: str) -> str:
    return hashlib.sha256(unsigned(url).encode("utf-8", "surrogateescape")).hexdigest()


def _hash(file: BufferedRandom) -> str:
    file.seek(0)
    return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
