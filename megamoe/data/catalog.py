"""The shards of a data set: learnt one by one as they are first needed, each sample's id, and the set's fingerprint."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megamoe.data.decode import CorruptSample
from megamoe.data.index import SampleEntry, ShardIndex, learn_index, read_index
from megamoe.data.remote import ShardUnavailable
from megamoe.data.shards import is_remote, shard_labels
from megamoe.data.split import held_out, key_hash
from megamoe.data.storage import Storage
from megamoe.errors import DataError

_CACHED_SAMPLES = 1 << 20  # indexes kept in memory describe at most this many samples (about 60 MB)
_SIZED = 10_000  # sizes of so many local shards are part of the fingerprint; more would take a start-up too long

Quarantine = Mapping[str, int]


class BadShard(DataError):
    """A shard that cannot be used now: not to be had, damaged, or not what was indexed.

    Attributes:
        shard: its name.
        count: its samples, -1 if that was never learnt.
    """

    def __init__(self, message: str, shard: str, count: int) -> None:
        super().__init__(message)
        self.shard, self.count = shard, count

    def __reduce__(self) -> tuple[type[BadShard], tuple[str, str, int]]:
        return BadShard, (str(self), self.shard, self.count)


@dataclass(frozen=True)
class Source:
    """Shards that are mixed with those of other sources; ``weight`` is its share of the samples read."""

    name: str
    shards: Sequence[str]
    weight: float = 1.0


class Located(NamedTuple):
    """A sample: its id ``<shard>#<key>``, its shard, and where in it its members lie."""

    id: str
    shard: str
    entry: SampleEntry


@dataclass(frozen=True)
class DataSet:
    """All sources of a run and how they are read. Small: O(shards), no sample is known yet.

    Attributes:
        sources: at least one.
        index_dir: where indexes are that do not lie beside their shards; learnt ones are written there.
        held_out: share of the samples, chosen by their keys, that training does not see.
        quarantine: shards that are not read any more, and the samples that each one counts for in the order.
    """

    sources: Sequence[Source]
    index_dir: Path | None = None
    held_out: float = 0.0
    quarantine: Quarantine = field(default_factory=dict)


class Catalog:
    """What one process knows of the shards that it has touched. Not to be sent to another process.

    ``labels`` are the shards' names in sample ids, by source: see :func:`megamoe.data.shards.shard_labels`.
    """

    def __init__(self, data: DataSet, storage: Storage) -> None:
        self._data = data
        self._storage = storage
        labels = iter(shard_labels([shard for source in data.sources for shard in source.shards]))
        self.labels = [[next(labels) for _ in source.shards] for source in data.sources]
        self._loaded: OrderedDict[str, tuple[ShardIndex, npt.NDArray[np.int64] | None]] = OrderedDict()

    def count(self, source: int, shard: int) -> int:
        """Samples of a shard that training reads. Learns its index if this is the first time.

        Raises:
            BadShard: it cannot be used, and is not in quarantine.
        """
        name = self._data.sources[source].shards[shard]
        if name in self._data.quarantine:
            return self._data.quarantine[name]
        index, kept = self._index(name)
        return index.samples if kept is None else len(kept)

    def sample(self, source: int, shard: int, sample: int) -> Located:
        """Sample number ``sample`` of those that :meth:`count` counts.

        Raises:
            CorruptSample: its shard is in quarantine.
            BadShard: its shard cannot be used.
        """
        name, label = self._data.sources[source].shards[shard], self.labels[source][shard]
        if name in self._data.quarantine:
            raise CorruptSample("shard: in quarantine")
        index, kept = self._index(name)
        entry = index.sample(sample if kept is None else int(kept[sample]))
        return Located(f"{label}#{entry.key}", name, entry)

    def left_out(self, source: int, shard: int) -> list[tuple[str, str]]:
        """Samples of a shard that are never read: (id, why). They lack a picture or a caption, or their key comes twice."""
        name, label = self._data.sources[source].shards[shard], self.labels[source][shard]
        if name in self._data.quarantine:
            return []
        index, _ = self._index(name)
        twice = [(key, "incomplete: its key comes twice") for key in index.duplicates]
        return [(f"{label}#{key}", why) for key, why in [(k, f"incomplete: {w}") for k, w in index.incomplete] + twice]

    def read(self, located: Located) -> tuple[bytes, bytes]:
        """Bytes of the picture and of the caption of a located sample.

        Raises:
            BadShard: the shard cannot be read, or is not what was indexed.
        """
        try:
            image, text = self._storage.read(located.shard, (located.entry.image, located.entry.text))
            return image, text
        except DataError as error:
            raise self._bad(located.shard, error) from error

    def read_all(self, source: int, shard: int, sample: int) -> tuple[str, dict[str, bytes]]:
        """Key of a sample, numbered as in :meth:`sample`, and the bytes of all its members by extension, in their order.

        Raises:
            CorruptSample: its shard is in quarantine.
            BadShard: its shard cannot be used.
        """
        name = self._data.sources[source].shards[shard]
        if name in self._data.quarantine:
            raise CorruptSample("shard: in quarantine")
        index, kept = self._index(name)
        number = sample if kept is None else int(kept[sample])
        extents = index.members(number)
        try:
            contents = self._storage.read(name, list(extents.values()))
        except DataError as error:
            raise self._bad(name, error) from error
        return index.key(number), dict(zip(extents, contents, strict=True))

    def _index(self, shard: str) -> tuple[ShardIndex, npt.NDArray[np.int64] | None]:
        """The index of ``shard`` and, if some samples are held out, the numbers of the others."""
        if shard in self._loaded:
            self._loaded.move_to_end(shard)
            return self._loaded[shard]
        try:
            index = learn_index(shard, self._data.index_dir, self._storage.state(shard))
        except DataError as error:
            raise self._bad(shard, error) from error
        kept = _trained_on(index, self._data.held_out) if self._data.held_out else None
        self._loaded[shard] = index, kept
        held = sum(known.samples for known, _ in self._loaded.values())
        while held > _CACHED_SAMPLES and len(self._loaded) > 1:
            held -= self._loaded.popitem(last=False)[1][0].samples
        return index, kept

    def _bad(self, shard: str, error: DataError) -> BadShard:
        if not isinstance(error, ShardUnavailable):
            self._storage.forget(shard)  # a page of HTML in place of a tar must not stay in the cache
        known = self._loaded.get(shard)
        count = -1 if known is None else known[0].samples if known[1] is None else len(known[1])
        return BadShard(str(error), shard, count)


def learnt_count(data: DataSet, shard: str) -> int:
    """What :meth:`Catalog.count` says of ``shard`` if its index can be read, whether or not the shard can; else -1."""
    try:
        index = read_index(shard, data.index_dir)
    except DataError:
        return -1
    return len(_trained_on(index, data.held_out))


def _trained_on(index: ShardIndex, share: float) -> npt.NDArray[np.int64]:
    """Numbers of the samples that are not held out."""
    hashes = np.array([key_hash(index.key(i)) for i in range(index.samples)], dtype=np.uint64)
    return np.flatnonzero(~held_out(hashes, share))


def data_fingerprint(data: DataSet) -> str:
    """16 hex digits over names, weights and, of up to 10,000 local shards, sizes, in their order.

    Two runs with equal fingerprints, seeds and global batches read the same samples in the same order, unless a shard was
    replaced by another one of its name; its index tells that when it is read. Folders do not count: data may move.
    """
    digest = hashlib.sha256(f"{data.held_out}\n".encode())
    local = [shard for source in data.sources for shard in source.shards if not is_remote(shard)]
    sized = set(local) if len(local) <= _SIZED else set()
    for source in data.sources:
        digest.update(f"{source.weight if len(data.sources) > 1 else 1.0}\n".encode())
        for shard in source.shards:
            size = Path(shard).stat().st_size if shard in sized else ""
            digest.update(f"{Path(shard).name}\0{size}\n".encode())
    return digest.hexdigest()[:16]
