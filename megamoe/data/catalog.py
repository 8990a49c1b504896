"""The shards of a data set together: counts at once, offsets when they are first needed, ids and fingerprint."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from megamoe.data.index import IndexHeader, ShardIndex, load_header, load_index
from megamoe.data.shards import shard_labels

_CACHED_SAMPLES = 1 << 20  # indexes kept in memory describe at most this many samples (about 60 MB)


class ShardSet:
    """Indexed shards. Small to send to another process; each process loads the indexes that it touches.

    ``labels`` are the shards' names in sample ids: see :func:`megamoe.data.shards.shard_labels`.

    Raises:
        DataError: a shard has no index, or one that is damaged or older than the shard.
    """

    def __init__(self, shards: Sequence[Path], index_dir: Path | None = None) -> None:
        self.shards = list(shards)
        self.index_dir = index_dir
        self.headers: list[IndexHeader] = [load_header(shard, index_dir) for shard in self.shards]
        self.labels = shard_labels(self.shards)
        self._loaded: OrderedDict[int, ShardIndex] = OrderedDict()

    @property
    def counts(self) -> list[int]:
        """Complete samples of each shard."""
        return [header.samples for header in self.headers]

    @property
    def samples(self) -> int:
        """Complete samples in all."""
        return sum(header.samples for header in self.headers)

    @property
    def left_out(self) -> int:
        """Samples that the indexes leave out: no picture, no caption, or a key that comes twice."""
        return sum(header.incomplete + header.duplicates for header in self.headers)

    def index(self, shard: int) -> ShardIndex:
        """Offsets of shard number ``shard``; the most recent ones stay in memory."""
        if shard in self._loaded:
            self._loaded.move_to_end(shard)
            return self._loaded[shard]
        index = self._loaded[shard] = load_index(self.shards[shard], self.index_dir)
        held = sum(kept.samples for kept in self._loaded.values())
        while held > _CACHED_SAMPLES and len(self._loaded) > 1:
            held -= self._loaded.popitem(last=False)[1].samples
        return index

    def sample_id(self, shard: int, sample: int) -> str:
        """``<shard>#<key>``, unique in the data set."""
        return f"{self.labels[shard]}#{self.index(shard).key(sample)}"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_loaded": OrderedDict()}


def data_fingerprint(shards: ShardSet) -> str:
    """16 hex digits over names, sizes and sample counts of the shards, in their order.

    Two runs with equal fingerprints, seeds and global batches read the same samples in the same order. Folders do not
    count: data may move between runs.
    """
    digest = hashlib.sha256()
    for header in shards.headers:
        digest.update(f"{header.shard}\0{header.bytes}\0{header.samples}\n".encode())
    return digest.hexdigest()[:16]
