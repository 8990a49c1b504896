"""Read members by shard and offset, from files that stay open.

A shard is named by a local path or by anything that :mod:`..remote.download` can fetch. Fetched shards are read from the
cache that all processes of a node share.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe.core.errors import DataError
from megamoe.core.urls import masked
from megamoe.data.remote.cache import ShardCache
from megamoe.data.remote.download import ShardUnavailable
from megamoe.data.shards.expand import is_remote
from megamoe.data.shards.index import Extent, ShardState
from megamoe.data.shards.tar import BLOCK

MOST_FILES = 1 << 16  # open files of a process if the system sets no limit
_GAP = 1 << 16  # bytes between members that are read in vain to save a second read


@dataclass
class _OpenShard:
    descriptor: int
    state: ShardState
    cached_since: float | None = None  # when the cached copy was fetched, if that was before this reader opened it


class Storage:
    """Read members of shards. Use one per process.

    Attributes:
        limit: maximum number of open shards; the least recently used is closed first.
        counters: what was done so far: ``downloads`` and ``cache_hits`` of shards that are not local files, and the
            ``retries`` and bytes ``received`` for them. The caller may take and clear them.
    """

    def __init__(self, cache: ShardCache | None = None, limit: int = 128) -> None:
        self._cache = cache
        self.limit = limit
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self.counters: Counter[str] = Counter()

    def read(self, shard: str, extents: Sequence[Extent]) -> list[memoryview]:
        """Return the contents of members of ``shard``, read-only.

        Members that lie close together, as those of a sample do, take one read. The tar header in front of each must be
        the one that was indexed, so a shard that was replaced gives an error, not the bytes of another sample.

        Raises:
            ShardUnavailable: the shard cannot be opened or read.
            DataError: it ends too early, or is not the one that was indexed.
        """
        first, last, total = extents[0].offset, 0, 0
        for offset, size, _ in extents:
            first, last, total = min(first, offset), max(last, offset + size), total + size
        if last - first > total + _GAP:
            return [self._read(shard, e.offset - BLOCK, e.offset + e.size, [e])[0] for e in extents]
        return self._read(shard, first - BLOCK, last, extents)

    def _read(self, shard: str, first: int, last: int, extents: Sequence[Extent]) -> list[memoryview]:
        data = memoryview(self._bytes(shard, first, last - first))
        contents = []
        for offset, size, header in extents:
            at = offset - first
            if zlib.crc32(data[at - BLOCK : at]) != header:
                remedy = "start again to fetch it again" if is_remote(shard) else f"run `megamoe data index {shard}`"
                raise DataError(f"shard {masked(shard)}: changed at byte {offset} since it was indexed; {remedy}")
            contents.append(data[at : at + size])
        return contents

    def _bytes(self, shard: str, start: int, want: int) -> bytes:
        file = self._opened(shard).descriptor
        pieces = []
        try:
            while want:  # one call may return less than asked for (2 GiB, interrupted network reads)
                piece = os.pread(file, want, start)
                if not piece:
                    raise DataError(f"shard {masked(shard)}: ends at byte {start}, within a member; copy it again")
                pieces.append(piece)
                start += len(piece)
                want -= len(piece)
        except OSError as error:
            raise ShardUnavailable(f"shard {masked(shard)}: cannot be read at byte {start} ({error.strerror})") from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def state(self, shard: str) -> ShardState:
        """Return where ``shard`` lies on this machine, and what distinguishes it from an earlier one of its name.

        A remote shard is fetched if necessary.

        Raises:
            ShardUnavailable: the shard is not available.
        """
        return self._opened(shard).state

    def forget(self, shard: str) -> None:
        """Remove ``shard`` from the cache: its bytes are bad, and the next reader must not get them."""
        if is_remote(shard) and self._cache is not None:
            self._cache.forget(shard)
        if shard in self._open:
            os.close(self._open.pop(shard).descriptor)

    def renew(self, shard: str) -> bool:
        """Remove ``shard`` from the cache if its copy is older than this reader; return whether there was such a copy."""
        since = self._open[shard].cached_since if shard in self._open else None
        if since is None or self._cache is None:
            return False
        self._cache.forget(shard, since)
        os.close(self._open.pop(shard).descriptor)
        return True

    def close(self) -> None:
        """Close all files; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def _opened(self, shard: str) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self.limit:
            os.close(self._open.popitem(last=False)[1].descriptor)
        opened = self._open[shard] = self._open_shard(shard)
        return opened

    def _open_shard(self, shard: str) -> _OpenShard:
        if is_remote(shard):
            if self._cache is None:
                raise DataError(f"shard {masked(shard)}: is not a local file, and there is no cache to keep it in")
            file, fetched = self._cache.open(shard)
            with file:
                descriptor = os.dup(file.fileno())
            self.counters["cache_hits" if fetched.hit else "downloads"] += 1
            self.counters["retries"] += fetched.retries
            self.counters["received"] += fetched.received
            state = ShardState(fetched.path, fetched.size, 0, fetched.identity)
            return _OpenShard(descriptor, state, fetched.since if fetched.hit else None)
        try:
            descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardUnavailable(f"shard {masked(shard)}: cannot be opened ({error.strerror}); check the path") from error
        status = os.fstat(descriptor)
        return _OpenShard(descriptor, ShardState(Path(shard), status.st_size, status.st_mtime_ns, ""))
